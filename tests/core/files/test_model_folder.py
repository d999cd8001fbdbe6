"""Folders with models: what they hold is known from headers alone, and what leads elsewhere is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_slim import SlimLoadError
from hf_slim.core.files.model_folder import INDEX, check_config, check_model_folder, refuse_pickles, shards_of
from tests import tiny


@pytest.fixture
def whole(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def sharded(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    return tmp_path / "sharded"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_weights_are_the_same_in_one_file_and_in_shards(whole, sharded):
    one, several = check_model_folder(whole), check_model_folder(sharded)
    state = load_file(whole / "model.safetensors")
    assert one.tensors == several.tensors
    assert {name: tensor.shape for name, tensor in one.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    assert len(several.files) == len(shards_of(sharded / INDEX)) > 1
    assert one.numel == sum(tensor.numel() for tensor in state.values())
    assert one.size_bytes == (whole / "model.safetensors").stat().st_size
    assert several.size_bytes == sum(path.stat().st_size for path in sharded.glob("*.safetensors"))


@pytest.mark.parametrize(
    "name", ["../whole/model.safetensors", "/dev/zero", "/dev/stdin", "inner/x.safetensors", 3, ""]
)
def test_an_index_may_not_lead_outside(sharded, whole, name):
    edit(sharded / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(SlimLoadError, match=r"Allowed is the name of a file inside|shards end in|is missing in"):
        check_model_folder(sharded)


def test_an_absolute_path_is_refused_even_to_a_file_of_the_folder(sharded):
    name = shards_of(sharded / INDEX)[0]
    edit(sharded / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": str(sharded / name)}))
    with pytest.raises(SlimLoadError, match="without a path"):
        check_model_folder(sharded)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: index.pop("weight_map"), "must have `metadata` and a `weight_map`"),
        (lambda index: index.update(weight_map={}), "must have `metadata` and a `weight_map`"),
        (lambda index: index.update(metadata=[]), "must have `metadata` and a `weight_map`"),
        (lambda index: index["weight_map"].update(more="model-00001-of-00009.safetensors"), "is missing in"),
        (lambda index: index["weight_map"].update(more="config.json"), "shards end in"),
    ],
)
def test_a_damaged_index_is_refused(sharded, change, says):
    edit(sharded / INDEX, change)
    with pytest.raises(SlimLoadError, match=says):
        check_model_folder(sharded)


def test_every_tensor_is_in_exactly_one_shard(sharded):
    edit(sharded / INDEX, lambda index: index["weight_map"].update(more=index["weight_map"]["model.norm.weight"]))
    with pytest.raises(SlimLoadError, match=r"names the tensor 'more', which no shard holds"):
        check_model_folder(sharded)
    edit(sharded / INDEX, lambda index: index["weight_map"].update(more="twice.safetensors"))
    save_file({"more": torch.zeros(2), "model.norm.weight": torch.zeros(48)}, sharded / "twice.safetensors")
    with pytest.raises(SlimLoadError, match=r"'model\.norm\.weight' is in .* and in another shard"):
        check_model_folder(sharded)


def test_shards_may_not_be_links_to_elsewhere(sharded, whole):
    name = shards_of(sharded / INDEX)[0]
    (sharded / name).rename(whole.parent / name)
    (sharded / name).symlink_to(whole.parent / name)
    with pytest.raises(SlimLoadError, match="outside of the folder"):
        check_model_folder(sharded)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**9}, r"'num_hidden_layers': 1000000000; its weights allow at most 512"),
        ({"num_labels": 10**9}, "'num_labels'"),
        ({"text_config": {"inner": [{"n_experts": 10**7}]}}, "'n_experts'"),
        ({"depths": [2, 2, 10**8]}, "'depths'"),
        ({"attn_implementation": "somebody/attention"}, "code to be downloaded"),
        ({"text_config": {"_attn_implementation": "a/b"}}, "code to be downloaded"),
        ({"transformers_weights": "../x.safetensors"}, "without a path"),
        ({"transformers_weights": "pytorch_model.bin"}, "must name a safetensors file"),
        ({"transformers_weights": ["model.safetensors"]}, "must name a safetensors file"),
    ],
)
def test_a_config_that_asks_for_too_much_or_for_code_is_refused(whole, change, says):
    edit(whole / "config.json", lambda config: config.update(change))
    with pytest.raises(SlimLoadError, match=says):
        check_model_folder(whole)


def test_sizes_that_the_weights_hold_are_allowed():
    check_config({"num_labels": 21_000, "max_position_embeddings": 10**7, "vocab_size": 10**6}, None, "config.json")
    for name, most in (("n_layer", 512), ("num_attention_heads", 4096), ("num_labels", 2**17)):
        check_config({name: most}, None, "config.json")
        with pytest.raises(SlimLoadError, match=f"allow at most {most:,}"):
            check_config({name: most + 1}, None, "config.json")


def test_a_folder_without_weights_or_with_pickles(tmp_path):
    assert check_model_folder(tmp_path) is None
    refuse_pickles(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"")
    refuse_pickles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SlimLoadError, match=r"only 'pytorch_model\.bin', which can run code"):
        refuse_pickles(tmp_path)
