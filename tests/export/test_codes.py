"""Codes and scales that exporters read are those of the packed layers, whatever the grid."""

import pytest
import torch

from hf_slim import QuantizationConfig, SlimError, prepare
from hf_slim.core.contracts import PackedLayer
from hf_slim.export.codes import codes_of, float_values, is_packed_weight, schemes_of, weights_of
from tests import tiny
from tests.export import models

SCHEMES = [
    "w8a8", "w4a16-g32", "w4a16-g16", "w3a16-g128", "w2a16", "w4a16-g32-asym", "w4a16-unsigned", "w8a16-tensor",
    "w1.58a8",
]  # fmt: skip
UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_times_scales_are_the_values_of_the_layer(scheme):
    of_rows = scheme not in ("w8a16-tensor", "w1.58a8")
    model = models.packed(models.llama(), scheme, embeddings=scheme if of_rows else None)
    assert len(schemes_of(model)) == 3 * 7 + of_rows
    for path in schemes_of(model):
        codes = codes_of(model, path)
        rows, columns = codes.shape
        assert codes.codes.shape == (rows, columns)
        assert codes.scale.shape == (rows, -(-columns // codes.group_size))
        spread = codes.scale.repeat_interleave(codes.group_size, dim=1)[:, :columns]
        values = codes.codes.float()
        if codes.zero_point is not None:
            values = values - codes.zero_point.repeat_interleave(codes.group_size, dim=1)[:, :columns]
        assert torch.equal(values * spread, float_values(model, path))


def test_float_values_are_what_the_layer_computes_with():
    model = models.packed(models.llama(), "nf4")
    layer = model.model.layers[1].mlp.down_proj
    assert torch.equal(float_values(model, "model.layers.1.mlp.down_proj.weight"), layer.dequantized(torch.float32))
    assert torch.equal(float_values(model, "model.norm.weight"), model.model.norm.weight)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "fp8", "codebook3"])
def test_a_grid_without_integer_codes_says_so(kind):
    model = models.packed(models.llama(), kind)
    with pytest.raises(SlimError, match=f"'{kind.strip('3')}'"):
        codes_of(model, UP)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_named_with_its_owner(tied):
    model = models.packed(models.llama(tie_word_embeddings=tied), "w4a16-g32", embeddings="w8a16")
    assert weights_of(model)[HEAD] == (EMBEDDING if tied else HEAD)
    assert (HEAD in schemes_of(model)) != tied
    assert schemes_of(model)[EMBEDDING].weights.bits == 8
    assert len(schemes_of(model)) == len([m for m in model.modules() if isinstance(m, PackedLayer)]) - tied


def test_scales_repeat_for_smaller_groups():
    codes = codes_of(models.packed(models.llama(), "w4a16-g64"), UP)
    halves = codes.scale_in_groups(32)
    assert torch.equal(halves, codes.scale.repeat_interleave(2, dim=1))
    whole = codes_of(models.packed(models.llama(), "w8a16"), UP)
    assert torch.equal(whole.scale_in_groups(16), whole.scale.expand(-1, 8))
    with pytest.raises(SlimError, match="cannot be cut into 48"):
        codes.scale_in_groups(48)


def test_a_model_in_training_is_refused():
    with pytest.raises(SlimError, match="training-time form"):
        weights_of(prepare(models.llama(), QuantizationConfig("w8a8")))


def test_experts_have_codes():
    experts = models.packed(tiny.mixtral(), "w4a16-g16")
    paths = [path for path in schemes_of(experts) if "experts" in path]
    assert paths
    for path in paths:
        assert is_packed_weight(experts, path)
        assert float_values(experts, path).shape == codes_of(experts, path).shape
        assert (
            codes_of(experts, path).codes.shape[0]
            == experts.config.num_local_experts * codes_of(experts, path).shape[1]
        )
