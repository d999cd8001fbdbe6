"""Damaged folders: refused with a SlimLoadError, or loaded with equal values; no other error, and no more memory.

HF_SLIM_FUZZ=100000 draws that many inputs in all tests that use `tests/damage.py`, and 400 more for whole loads.
"""

import copy
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from hf_slim import PruningConfig, QuantizationConfig, SlimError, SlimLoadError, convert, prepare, verify
from hf_slim.core.files.model_folder import check_model_folder, read_config
from hf_slim.integration import hf_quantizer
from hf_slim.integration.hf_quantizer import HfSlimConfig
from hf_slim.integration.loading import load_model
from hf_slim.integration.trust.checksums import KEY, check_checksums
from hf_slim.integration.trust.manifest import differences, listed, read_manifest, write_manifest
from hf_slim.integration.trust.schemes import quantization_settings, schemes_of
from hf_slim.integration.trust.settings import CODES_PER_BYTE, check_sizes
from hf_slim.integration.trust.tensors import SPARE_BYTES
from tests import tiny
from tests.damage import damage, edit_json, files_opened, fuzzing, memory_used

PRUNING = PruningConfig(sparsity={"ffn": 0.4, "kv_heads": 0.34}, uniform=False, criterion="l2")
PACKED = QuantizationConfig("w4a16", group_size=16, embeddings="w8a16")
MADE = {"whole": "1GB", "sharded": "15KB"}  # the largest size of a shard


@pytest.fixture(scope="module", params=MADE)
def folder(request, tmp_path_factory):
    """A folder in memory, where the system has such a place: it is written and read a hundred thousand times."""
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path_factory.getbasetemp()
    made = place / f"hf_slim-fuzz-{os.getpid()}-{request.param}"
    model = convert(prepare(tiny.llama(), PRUNING, PACKED))
    model.save_pretrained(made, max_shard_size=MADE[request.param])
    write_manifest(made)
    yield made
    shutil.rmtree(made)


class Restored:
    """A folder that is whole again afterwards."""

    def __init__(self, folder):
        self.folder, self.whole = folder, {path.name: path.read_bytes() for path in folder.iterdir()}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for name, raw in self.whole.items():
            (self.folder / name).write_bytes(raw)

    def changed(self):
        return [name for name, raw in self.whole.items() if self.content(name) != raw]

    def content(self, name):
        return (self.folder / name).read_bytes() if (self.folder / name).exists() else None


def check_everything(folder):
    """All checks that need no model, as `verify`, our quantizer and `load_model` make them."""
    weights = check_model_folder(folder)
    config = read_config(folder)
    settings = config.get("quantization_config")
    if isinstance(settings, dict):
        described = HfSlimConfig(**{str(name): value for name, value in settings.items()})
        check_checksums(described.to_dict(), config.get(KEY))
        quantization_settings(described.techniques, described.mode == "qat")
        if weights is not None:
            check_sizes(described.shapes, described.attributes, weights)
            schemes_of(described.layers, CODES_PER_BYTE * weights.size_bytes)
    return differences(folder, read_manifest(folder))


@fuzzing(80, share=0.15)  # for each of two folders
@given(data=st.data())
def test_checks_refuse_or_notice_every_change(folder, data):
    with Restored(folder) as restored:
        present = sorted(path.name for path in folder.iterdir())
        for name in data.draw(st.lists(st.sampled_from(present), min_size=1, max_size=2, unique=True)):
            damage(data.draw, folder, name)
        size = sum(path.stat().st_size for path in folder.iterdir())
        changed = set(restored.changed())
        with files_opened() as opened, memory_used() as memory:
            try:
                found = check_everything(folder)
            except SlimLoadError as error:
                found = [str(error)]
        assert max(map(len, found), default=0) < 3000
        if "hf_slim.json" not in changed:  # it may have lost the very line of a file that is gone
            assert bool(found) == bool(changed)
        assert memory.peak < 2 * size + 2**20
        assert {os.path.dirname(path) for path in opened} <= {str(folder)}


SETTINGS = HfSlimConfig(
    "packed", {"a.weight": [4, 6]}, {"a": {"num_heads": 2, "scaling": 0.5}},
    {"a": "w4a16-g16", "b": {"weights": {"kind": "int", "bits": 4, "granularity": "channel"}}},
    {"quantization": PACKED.to_dict(), "pruning": PRUNING.to_dict()}, "0.3.0", 3,
).to_dict()  # fmt: skip


@fuzzing(200, share=0.3)
@given(data=st.data())
def test_settings_without_checksums_raise_nothing_else_either(data):
    settings = SETTINGS | {"mode": data.draw(st.sampled_from(["packed", "qat", "pruned"]))}
    for _ in range(data.draw(st.integers(1, 3))):
        settings = edit_json(data.draw, settings)
        if not isinstance(settings, dict):
            return
    with suppress(SlimError):
        described = HfSlimConfig(**settings)
        schemes_of(described.layers, 10**4)
        quantization_settings(described.techniques, described.mode == "qat")


class LargestTensor(TorchDispatchMode):
    """The most bytes that any operation inside makes on a real device."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return made


@fuzzing(10, share=0.001)
@given(data=st.data())
def test_a_damaged_folder_is_refused_or_loads_and_is_noticed(folder, data):
    expected = tiny.logits(load_model(str(folder)))
    with Restored(folder) as restored:
        damage(data.draw, folder, data.draw(st.sampled_from(sorted(listed(folder)))))
        size = sum(path.stat().st_size for path in folder.iterdir())
        with LargestTensor() as largest:
            try:
                loaded = load_model(str(folder))
            except SlimLoadError:
                loaded = None
        assert largest.size <= 2 * size + SPARE_BYTES
        if loaded is not None and restored.changed():
            with pytest.raises(SlimLoadError):  # what this model cannot show, the manifest does
                verify(folder)
            if restored.changed() not in (["config.json"], ["model.safetensors"]) and len(restored.whole) < 5:
                assert torch.equal(tiny.logits(loaded), expected)


@fuzzing(10, share=0.001)
@given(data=st.data())
def test_no_edit_of_the_settings_loads_with_other_values(folder, data):
    """With the checksums each is refused; without them, what loads has the shapes and types of its files."""
    config = json.loads((folder / "config.json").read_text())
    edited = copy.deepcopy(config)
    edited["quantization_config"] = edit_json(data.draw, config["quantization_config"])
    if json.dumps(edited, sort_keys=True) == json.dumps(config, sort_keys=True):
        return
    expected = tiny.logits(load_model(str(folder)))
    loads = [load_model, AutoModelForCausalLM.from_pretrained]
    with Restored(folder):
        (folder / "config.json").write_text(json.dumps(edited))
        method = edited["quantization_config"]
        ours = isinstance(method, dict) and method.get("quant_method") == hf_quantizer.METHOD
        for load in loads[: 1 if not ours else 2]:  # transformers itself refuses methods that it does not know
            with suppress(SlimLoadError):
                loaded = load(str(folder))
                assert method.get("format_version") is None  # the one key that may be missing, and follows then
                assert torch.equal(tiny.logits(loaded), expected)
        del edited[KEY]
        (folder / "config.json").write_text(json.dumps(edited))
        for load in loads[: 1 if not ours else 2]:
            with suppress(SlimLoadError):
                load(str(folder))
