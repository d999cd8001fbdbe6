"""Models by name: a folder without the network, a Hub id from the cache, and safetensors alone from both."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils.hub import cached_file

from hf_slim import SlimLoadError
from hf_slim.core.files.model_folder import check_model_folder
from hf_slim.integration.trust import source
from tests import tiny

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Puts a folder into a cache of the Hub, as the model `somebody/model`, and gives its snapshot."""

    def put(folder):
        repository = tmp_path / "cache" / "models--somebody--model"
        snapshot = repository / "snapshots" / COMMIT
        for place in (snapshot, repository / "blobs", repository / "refs"):
            place.mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        for number, path in enumerate(sorted(folder.iterdir())):
            (repository / "blobs" / str(number)).write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        return snapshot

    monkeypatch.setattr(source, "cached_file", functools.partial(cached_file, cache_dir=str(tmp_path / "cache")))
    return put


@pytest.mark.parametrize("size", ["1GB", "60KB"])
def test_the_files_of_a_hub_id_are_checked_in_the_cache(cache, tmp_path, size):
    tiny.llama().save_pretrained(tmp_path / "model", max_shard_size=size)
    snapshot = cache(tmp_path / "model")
    assert source.checked_weights("somebody/model").tensors == check_model_folder(tmp_path / "model").tensors
    shard = next(snapshot.glob("*.safetensors"))
    shard.resolve().write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SlimLoadError, match="is no complete safetensors file"):
        source.checked_weights("somebody/model")


def test_an_index_of_a_hub_id_may_not_lead_outside(cache, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model", max_shard_size="60KB")
    path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../../refs/main"
    path.write_text(json.dumps(index))
    cache(tmp_path / "model")
    with pytest.raises(SlimLoadError, match="without a path"):
        source.checked_weights("somebody/model")


def test_a_hub_id_without_safetensors_is_refused_and_one_without_a_config_left_open(cache, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    snapshot = cache(tmp_path / "model")
    with pytest.raises(SlimLoadError, match="'somebody/model' has no weights in safetensors"):
        source.checked_weights("somebody/model")
    (snapshot / "config.json").unlink()
    assert source.checked_weights("somebody/model") is None
    assert source.checked_weights("nobody/nothing") is None


@pytest.mark.slow
def test_a_folder_is_loaded_without_the_network(tmp_path):
    tiny.save_base(tmp_path)
    code = f"""
import sys
asked = []
sys.addaudithook(lambda event, arguments: event.startswith("socket.") and asked.append((event, arguments)))
from hf_slim import verify
from hf_slim.integration.loading import load_model, load_tokenizer
load_model({str(tmp_path)!r})
load_tokenizer({str(tmp_path)!r})
verify({str(tmp_path)!r}, record=True)
print([event for event, _ in asked if event in ("socket.connect", "socket.getaddrinfo")])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[]"
