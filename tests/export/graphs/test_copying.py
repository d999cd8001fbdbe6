"""A copy for a tracer shares its tensors with the model, and changes nothing of it."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from hf_slim.export.graphs.copying import with_layers_replaced
from tests import tiny
from tests.export.graphs.mixed import packed


def unchanged(path: str, module: nn.Module) -> None:
    return None


def state(model: nn.Module) -> dict:
    return {
        name: (type(module), set(vars(module)), {k: id(v) for k, v in module._parameters.items()}, id(module.forward))
        for name, module in model.named_modules()
    }


def test_the_copy_computes_the_same_with_the_same_tensors():
    model = tiny.llama()
    twin = with_layers_replaced(model, unchanged)
    assert torch.equal(tiny.logits(twin), tiny.logits(model))
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert not {id(m) for m in twin.modules()} & {id(m) for m in model.modules()}
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_the_model_is_left_alone_when_the_copy_is_changed(tmp_path):
    packed(tiny.llama(), "w8a8").save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    config, expected = copy.deepcopy(model.config.to_dict()), tiny.logits(model)
    twin = with_layers_replaced(model, lambda path, module: nn.Identity() if path.endswith("mlp") else None)
    twin.config.use_cache, twin.model.config.hidden_size = False, 8
    assert isinstance(twin.model.layers[0].mlp, nn.Identity)
    assert model.config.to_dict() == config
    assert model.hf_quantizer is not None
    assert torch.equal(tiny.logits(model), expected)


def test_the_copy_of_a_loaded_packed_model_is_an_ordinary_model(tmp_path):
    packed(tiny.llama(), "w8a8").save_pretrained(tmp_path)
    twin = with_layers_replaced(LlamaForCausalLM.from_pretrained(tmp_path), unchanged)
    assert getattr(twin, "hf_quantizer", None) is None
    assert "quantization_config" not in twin.config.to_dict()


def test_parts_of_a_model_share_one_config_as_before():
    twin = with_layers_replaced(tiny.llama(), unchanged)
    assert twin.model.config is twin.config
    assert twin.model.layers[1].self_attn.config is twin.config


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g16"])
def test_a_model_in_16_bits_becomes_one_in_32(scheme):
    model = packed(tiny.llama().bfloat16(), scheme, embeddings="w8a8")
    twin = with_layers_replaced(model, unchanged, torch.float32)
    assert tiny.logits(twin).dtype == torch.float32
    assert {p.dtype for p in twin.parameters()} == {torch.float32, torch.int8}
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.config.dtype == torch.float32
    assert tiny.logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(tiny.logits(twin), tiny.logits(model).float(), rtol=0.1, atol=0.1)
