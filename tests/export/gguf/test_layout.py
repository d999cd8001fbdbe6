"""Pruned models as GGUF: layers of different sizes, zero neurons, and what llama.cpp computes otherwise."""

import numpy as np
import pytest
import torch

from hf_slim import SlimError
from hf_slim.export.gguf.layout import rotation_order
from tests import tiny
from tests.export import models
from tests.export.gguf.files import field, forms, logits_of, tensors, written

pytest.importorskip("gguf", reason="needs the package gguf")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["w4a16-g32", "float"])
def test_layers_of_different_sizes_become_arrays(scheme, tmp_path):
    model = models.llama(num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    model = models.pruned(model, {"ffn": 0.4, "kv_heads": 0.25}, scheme)
    layers = model.model.layers
    assert len({layer.mlp.up_proj.out_features for layer in layers}) > 1
    one = written(model, tmp_path)
    assert field(one, "general.architecture") == "deci"
    for key, name in (("head_count", "q_proj"), ("head_count_kv", "k_proj")):
        heads = [layer.self_attn.get_submodule(name).out_features // 16 for layer in layers]
        assert field(one, f"deci.attention.{key}") == heads
    block = 1 if scheme == "float" else 32
    widths = [-(-layer.mlp.up_proj.out_features // block) * block for layer in layers]
    assert field(one, "deci.feed_forward_length") == widths
    assert one.verification.differing == 0


@pytest.mark.parametrize("scheme", ["w4a16-g32", "float"])
@pytest.mark.parametrize("kind", ["ffn_blocks", "attention_blocks"])
def test_layers_without_one_of_their_parts_are_written(kind, scheme, tmp_path):
    model = models.pruned(models.llama(), {kind: 0.34}, scheme)
    one = written(model, tmp_path)
    assert one.verification.differing == 0
    if kind == "ffn_blocks":  # llama.cpp would leave out the attention of a layer without any neurons
        assert sorted(field(one, "deci.feed_forward_length")) == [32, 256, 256]
        assert "zero neurons" in " ".join(one.verification.notes)
    else:
        gone = field(one, "deci.attention.head_count").index(0)
        assert not [name for name in forms(one) if name.startswith(f"blk.{gone}.attn_")]


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3"])
def test_widths_that_differ_are_filled_up_where_there_are_no_arrays(family, tmp_path, monkeypatch):
    tiny.only_reference_kernels(monkeypatch)
    model = models.pruned(models.DECODERS[family](), {"ffn": 0.4}, "w4a16-g32")
    one, ids = written(model, tmp_path), models.tokens()
    assert one.verification.differing == 0
    assert "uniform: true" in " ".join(one.verification.notes)
    torch.testing.assert_close(logits_of(one.path, ids), tiny.logits(model, ids))


def test_heads_that_differ_are_refused_where_there_are_no_arrays(tmp_path):
    model = models.qwen3(num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    with pytest.raises(SlimError, match=r"query heads.*uniform: true"):
        written(models.pruned(model, {"kv_heads": 0.42}), tmp_path)


def test_fewer_heads_in_every_layer_are_refused_where_llama_cpp_wants_them_all(tmp_path):
    with pytest.raises(SlimError, match=r"64 values wide.*128.*qwen2"):
        written(models.pruned(models.qwen2(), {"kv_heads": 0.5}, uniform=True), tmp_path)


def test_rows_that_no_block_divides_are_refused_with_the_cure(tmp_path):
    model = models.packed(models.llama(hidden_size=48, intermediate_size=96, head_dim=16), "w4a16-g16")
    with pytest.raises(SlimError, match=r"rows of 48 values.*round_to: 32"):
        written(model, tmp_path)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny.gpt2(), "'gpt2'"),
        (lambda: models.llama(hidden_act="gelu"), "silu"),
        (lambda: models.qwen3(use_sliding_window=True, sliding_window=16, max_window_layers=1), "sliding window"),
        (lambda: models.gemma3(query_pre_attn_scalar=64), "root of 256"),
        (lambda: models.gemma3(layer_types=["full_attention"] * 6), "every 6th"),
        (lambda: models.smollm3(no_rope_layers=[1, 0, 1]), "every 4th"),
        (lambda: models.llama().model, "output head"),
        (lambda: models.llama(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), "yarn"),
        (lambda: models.qwen3(rope_parameters=LLAMA3), "by frequency"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_llama_cpp_computes_otherwise_is_refused(model, reason, tmp_path):
    with pytest.raises(SlimError, match=reason):
        written(model(), tmp_path)


def test_frequencies_of_llama_3_are_written_as_factors(tmp_path):
    model = models.llama(rope_parameters=LLAMA3)
    one = written(model, tmp_path)
    factors = tensors(one)["rope_freqs.weight"].data
    plain = 1e4 ** -(np.arange(0, 32, 2) / 32)
    assert np.allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert factors.max() == pytest.approx(8)


def test_linear_scaling_is_written_as_such(tmp_path):
    one = written(models.qwen3(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}), tmp_path)
    assert field(one, "qwen3.rope.scaling.type") == "linear"
    assert field(one, "qwen3.rope.scaling.factor") == pytest.approx(4)


def test_a_window_in_every_layer_limits_the_context(tmp_path):
    one = written(models.mistral(sliding_window=32), tmp_path)
    assert field(one, "llama.context_length") == 32
    assert "32 tokens" in " ".join(one.verification.notes)


def test_rows_are_rotated_as_llama_cpp_does_it():
    """Rotating neighbours of the reordered rows is reordering the rows of the rotation of halves."""
    heads, size = 3, 8
    rows, angles = torch.randn(heads * size), torch.randn(size // 2)
    cos, sin = angles.cos(), angles.sin()
    low, high = rows.view(heads, 2, size // 2).unbind(1)
    halves = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=1).flatten()
    order = rotation_order(heads, size)
    even, odd = rows[order].view(heads, size // 2, 2).unbind(2)
    neighbours = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=2).flatten()
    assert torch.equal(neighbours, halves[order])
