"""`hf-slim export`: all or nothing on disk, every target that fits, and words for those that do not."""

import json
from pathlib import Path

import pytest
import torch

from hf_slim import SlimConfigError, SlimError, export_model
from hf_slim.cli.main import main
from hf_slim.export.exporter import EXPORTERS, Exporter, Verification
from hf_slim.workflows.folders.export import REPORT, as_text
from tests.export import models


class Copy(Exporter):
    """A target that writes one file."""

    def refusal(self, model, tokenizer, config):
        return ""

    def write(self, model, tokenizer, folder, config):
        (folder / "copy.bin").write_bytes(b"1234")
        return folder / "copy.bin"

    def verify(self, model, tokenizer, path, config):
        assert path.read_bytes() == b"1234"
        return Verification(1, 4)

    def command(self, path):
        return f"run {path}"


class Picky(Copy):
    """A target that holds nothing."""

    def refusal(self, model, tokenizer, config):
        return "Only models of size 0 fit."


class Absent(Copy):
    """A target whose package is not installed."""

    packages = ("no_such_package",)


class Broken(Copy):
    """A target that writes something else than the model."""

    def verify(self, model, tokenizer, path, config):
        raise SlimError("3 values differ.")


@pytest.fixture(autouse=True)
def _targets(monkeypatch):
    others = {"copy": Copy(), "picky": Picky(), "absent": Absent(), "broken": Broken()}
    monkeypatch.setattr(EXPORTERS, "_entries", EXPORTERS._entries | others)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A packed model with its tokenizer, as `trainer.save_model` leaves it."""
    models.packed(models.llama(), "w4a16-g32").save_pretrained(tmp_path / "small")
    models.byte_level().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_a_folder_is_exported_with_its_tokenizer(folder, tmp_path):
    pytest.importorskip("gguf", reason="needs the package gguf")
    one = export_model(folder, tmp_path / "out").exports[0]
    assert one.path == tmp_path / "out" / "model.gguf"
    assert one.size_bytes == one.path.stat().st_size
    assert str(one.path) in one.command
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["verification"]["differing"] == 0
    assert report["verification"]["values"] == one.verification.values > 100_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small"]


def test_a_model_in_memory_keeps_its_mode(tmp_path):
    model = models.llama().train()
    export_model(model, tmp_path / "out", "copy")
    assert model.training


def test_an_export_that_fails_leaves_nothing(tmp_path):
    for target, reason in (("broken", "3 values"), ("picky", "size 0")):
        with pytest.raises(SlimError, match=reason):
            export_model(models.llama(), tmp_path / "out", target)
    assert not list(tmp_path.iterdir())


def test_an_older_export_is_replaced_on_request_only_and_only_by_a_complete_one(tmp_path):
    export_model(models.llama(), tmp_path / "out", "copy")
    with pytest.raises(SlimError, match="--overwrite"):
        export_model(models.llama(), tmp_path / "out", "copy")
    with pytest.raises(SlimError, match="3 values"):
        export_model(models.llama(), tmp_path / "out", "broken", overwrite=True)
    assert (tmp_path / "out" / "copy.bin").exists()
    export_model(models.llama(), tmp_path / "out", "copy", overwrite=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(SlimError, match="other files"):
        export_model(models.llama(), tmp_path / "model", "copy", overwrite=True)


def test_all_writes_what_fits_and_says_why_others_do_not(folder, tmp_path, monkeypatch, caplog):
    kept = {name: EXPORTERS[name] for name in ("copy", "picky", "absent")}
    monkeypatch.setattr(EXPORTERS, "_entries", kept)
    report = export_model(folder, tmp_path / "out", "all")
    assert [one.path for one in report.exports] == [tmp_path / "out" / "copy" / "copy.bin"]
    assert report.refused == {"picky": "Only models of size 0 fit."}
    assert "pip install hf_slim[export]" in caplog.text
    text = as_text(report)
    assert "all 4 values equal" in text
    assert "picky: not written. Only models of size 0 fit." in text
    assert not (tmp_path / "out" / "picky").exists()


def test_what_cannot_work_is_said_before_the_model_is_loaded(tmp_path):
    with pytest.raises(SlimConfigError, match="Did you mean 'gguf'"):
        export_model("no/such/model", tmp_path / "out", "ggfu")
    with pytest.raises(SlimError, match="no_such_package"):
        export_model("no/such/model", tmp_path / "out", "absent")


def test_the_dtype_of_the_checkpoint_is_kept(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Copy, "write", lambda self, model, *rest: seen.append(model.dtype) or rest[1])
    monkeypatch.setattr(Copy, "verify", lambda *arguments: Verification(0, 0))
    models.llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    export_model(tmp_path / "base", tmp_path / "out", "copy")
    assert seen == [torch.bfloat16]


def test_the_command_prints_size_path_and_what_to_run(folder, tmp_path, capsys):
    pytest.importorskip("gguf", reason="needs the package gguf")
    assert main(["export", str(folder), "--to", "gguf"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "small-gguf" / "model.gguf"
    assert f"gguf: {path}, {path.parent.stat() and path.stat().st_size / 1e6:.1f} MB" in printed
    assert f"llama-cli -m {path}" in printed
    assert main(["export", str(folder), "--to", "gguf"]) == 2
