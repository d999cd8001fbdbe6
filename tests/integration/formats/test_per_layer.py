"""Sizes that differ between layers are in config.json as transformers says them, where a few numbers explain them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_slim import PruningConfig, QuantizationConfig, convert, prepare
from tests import families, tiny

NARROWER = PruningConfig(sparsity={"ffn": 0.4, "kv_heads": 0.5}, uniform=False, criterion="l2")
PACKED = QuantizationConfig("w8a16", embeddings="w8a16")


def small(family: str, *configs: object, **changes: object):
    model = families.FAMILIES[family].build(**changes)
    torch.nn.init.zeros_(model.get_submodule("model.layers.1.mlp.down_proj").weight)  # its neurons matter least
    torch.nn.init.zeros_(model.get_submodule("model.layers.0.self_attn.v_proj").weight)
    model.generation_config.pad_token_id = 0
    return convert(prepare(model, *configs))


def sizes(model) -> dict[str, dict[str, int]]:
    """What the layers of a model have: index -> field of the config -> number."""
    found = {}
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        found[str(index)] = {
            "intermediate_size": layer.mlp.down_proj.in_features,
            "num_attention_heads": attention.q_proj.out_features // attention.head_dim,
            "num_key_value_heads": attention.k_proj.out_features // attention.head_dim,
        }
    return found


@pytest.mark.parametrize("configs", [(NARROWER,), (NARROWER, PACKED)], ids=["pruned", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_config_json_says_the_sizes_of_every_layer(family, configs, tmp_path):
    model = small(family, *configs)
    model.save_pretrained(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    usual = {name: config[name] for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads")}
    differing = {
        index: {name: size for name, size in layer.items() if size != usual[name]}
        for index, layer in sizes(model).items()
    }
    assert config["per_layer_config"] == {index: layer for index, layer in differing.items() if layer}
    assert config["per_layer_config"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "small" / "config.json").read_bytes()


def test_a_static_cache_makes_room_for_the_heads_that_are_there(tmp_path):
    model = small("qwen3", NARROWER)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tiny.tokens(2)
    arguments = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = loaded.generate(ids, **arguments)
    assert torch.equal(
        loaded.generate(ids, cache_implementation="static", prefill_chunk_size=4, **arguments), expected
    )


def test_a_model_whose_layers_are_alike_says_nothing(tmp_path):
    alike = PruningConfig(sparsity={"ffn": 0.5}, uniform=True, criterion="l2")
    for name, configs in (("pruned", [alike]), ("packed", [PACKED])):
        small("llama", *configs).save_pretrained(tmp_path / name)
        assert "per_layer_config" not in json.loads((tmp_path / name / "config.json").read_text())


def test_pruning_again_says_the_new_sizes(tmp_path):
    small("llama", NARROWER).save_pretrained(tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    convert(prepare(again, PruningConfig(sparsity={"ffn": 0.3}, uniform=False, criterion="l2")))
    again.save_pretrained(tmp_path / "twice")
    said = json.loads((tmp_path / "twice" / "config.json").read_text())["per_layer_config"]
    assert {index: layer["intermediate_size"] for index, layer in said.items()} == {
        index: layer["intermediate_size"] for index, layer in sizes(again).items() if index in said
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert torch.equal(tiny.logits(loaded), tiny.logits(again))
