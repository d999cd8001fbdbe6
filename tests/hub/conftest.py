"""What tests of the Hub share: a fake one that this process talks to, and small models as folders."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hf_slim import PruningConfig, QuantizationConfig, convert, prepare
from hf_slim.hub.folder import describe_saved
from tests import tiny
from tests.hub.fake_hub import TOKEN, FakeHub
from tests.hub.reports import report


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub on this machine; nothing waits before it tries again."""
    with FakeHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        files = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made with the address that was set then
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def digests(folder: Path) -> dict[str, str]:
    """Every file of a folder with what it holds and when it was written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {str(path.relative_to(folder)): f"{text} {path.stat().st_mtime_ns}" for path, text in contents.items()}


def shard_(folder: Path) -> None:
    """Splits the one file of weights in two, with an index."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, inside in parts.items():
        save_file({name: weights[name] for name in inside}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def save_model(folder: Path, form: str = "slim", seed: int = 0) -> Path:
    """A small finished model with tokenizer and report, as `hf-slim train` leaves it, but for the card."""
    model = tiny.llama(seed)
    config = QuantizationConfig("w8a8", embeddings="w8a8") if form == "slim" else PruningConfig(criterion="l2")
    convert(prepare(model, config)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    made = report(seed, saved=describe_saved(folder))
    (folder / "report.json").write_text(json.dumps(made))
    (folder / "report.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished model."""
    return save_model(tmp_path / "small")
