"""Finished folders record what is in them, and say what differs afterwards."""

import json
import os
import shutil
import stat

import pytest

from hf_slim import PruningConfig, SlimLoadError, convert, prepare
from hf_slim.core.files import durable
from hf_slim.integration import saving
from hf_slim.integration.saving import publish
from hf_slim.integration.trust.manifest import MANIFEST, differences, listed, read_manifest, require_same
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    model = convert(prepare(tiny.llama(), PruningConfig(sparsity={"ffn": 0.4}, uniform=False, criterion="l2")))
    publish(model, tiny.tokenizer(), tmp_path / "made")
    return tmp_path / "made"


def test_a_finished_folder_records_every_file_that_is_loaded(folder):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert files.keys() == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert {name: entry["size"] for name, entry in files.items()} == {
        name: (folder / name).stat().st_size for name in files
    }
    require_same(folder, read_manifest(folder))


def test_documents_may_change(folder):
    for name in ("README.md", "report.json", "report.png", "LICENSE", ".gitattributes", "notes.MD"):
        (folder / name).write_text("x")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    require_same(folder, read_manifest(folder))


def test_every_other_change_is_named(folder):
    weights = (folder / "model.safetensors").read_bytes()
    changes = {
        "'model.safetensors' has other content": lambda: (folder / "model.safetensors").write_bytes(
            weights[:-1] + bytes([weights[-1] ^ 1])
        ),
        "'config.json' has": lambda: (folder / "config.json").write_text("{}"),
        "'tokenizer.json' is missing": lambda: (folder / "tokenizer.json").unlink(),
        "'modeling.py' was not there": lambda: (folder / "modeling.py").write_text(""),
        "'inner/vocab.txt' was not there": lambda: (
            (folder / "inner").mkdir(),
            (folder / "inner" / "vocab.txt").write_text("a"),
        ),
    }
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    for says, change in changes.items():
        change()
        found = differences(folder, read_manifest(folder))
        assert len(found) == 1
        assert found[0].startswith(says)
        with pytest.raises(SlimLoadError, match="if you mean the changes, record them"):
            require_same(folder, read_manifest(folder))
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)


def test_files_in_folders_are_recorded_and_links_to_elsewhere_refused(folder):
    (folder / "inner").mkdir()
    (folder / "inner" / "vocab.txt").write_text("a")
    assert "inner/vocab.txt" in listed(folder)
    (folder / "link").symlink_to("/etc")
    assert "link" in listed(folder)
    with pytest.raises(SlimLoadError, match="outside of the folder"):
        saving.write_manifest(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(format=2), "reads format 1. Install a newer hf_slim"),
        (lambda m: m.update(format="1"), "is damaged"),
        (lambda m: m.update(format=True), "is damaged"),
        (lambda m: m.update(files=[]), "is damaged"),
        (lambda m: m.pop("hf_slim"), "is damaged"),
        (lambda m: m["files"].update({"a": 3}), "must give size and sha256 of 'a'"),
        (lambda m: m["files"].update({"a": {"size": -1, "sha256": "0"}}), "must give size and sha256 of 'a'"),
    ],
)
def test_a_damaged_manifest_is_refused(folder, change, says):
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(SlimLoadError, match=says):
        read_manifest(folder)


def test_a_name_in_the_manifest_does_not_lead_outside(folder):
    content = json.loads((folder / MANIFEST).read_text())
    content["files"]["../outside"] = {"size": 1, "sha256": "0"}
    (folder / MANIFEST).write_text(json.dumps(content))
    (folder.parent / "outside").write_text("x")
    assert differences(folder, read_manifest(folder)) == ["'../outside' is missing"]


def test_a_folder_without_a_manifest_says_how_to_record_it(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    with pytest.raises(SlimLoadError, match=r"has no hf_slim\.json.*hf-slim verify --record"):
        read_manifest(tmp_path)


def test_a_folder_is_on_the_disk_and_readable_before_it_is_moved(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(durable.os, "fsync", lambda handle: events.append(os.readlink(f"/proc/self/fd/{handle}")))
    replace = os.replace
    monkeypatch.setattr(saving.os, "replace", lambda *paths: (events.append(str(paths[1])), replace(*paths)))
    publish(tiny.llama(), tiny.tokenizer(), tmp_path / "made")
    last = events.index(str(tmp_path / "made"))
    names = {os.path.basename(path) for path in events[:last]}
    assert {path.name for path in (tmp_path / "made").iterdir()} <= names
    assert events[last - 1].startswith(str(tmp_path / "made.partial-"))
    assert os.path.dirname(events[last - 1]) == str(tmp_path)
    assert events[-1] == str(tmp_path)
    usual = durable.usual_mode(tmp_path)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "made").iterdir()} == {usual}
