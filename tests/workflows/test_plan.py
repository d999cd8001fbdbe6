"""The estimates of a dry run against sums over the parameters."""

import pytest

from hf_slim import PruningConfig, QuantizationConfig
from hf_slim.integration.previews import Inputs, Preview, preview_pruning, preview_quantization
from hf_slim.workflows.plan import bytes_after
from tests import tiny


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def test_without_techniques_every_parameter_takes_four_bytes_once():
    model = tiny.llama(tie_word_embeddings=True)
    assert bytes_after(model, []) == bytes_after(model, [Preview()]) == 4 * count(model.parameters())


@pytest.mark.parametrize(("scheme", "bits"), [("w8a16", 8), ("w4a16", 4)])
def test_quantized_layers_take_their_bits_and_scales(scheme, bits):
    model = tiny.llama()
    preview = preview_quantization(model, QuantizationConfig(scheme, ignore=["lm_head"]), Inputs(None, None))
    quantized = [model.get_submodule(name).weight for name in preview.bits]
    scales = 4 * sum(len(weight) for weight in quantized)  # one in float32 per row
    expected = 4 * count(model.parameters()) - (4 - bits / 8) * count(quantized) + scales
    assert len(quantized) == 3 * 7
    assert bytes_after(model, [preview]) == pytest.approx(expected)


def test_removed_groups_take_their_bytes_along():
    model = tiny.llama()
    preview = preview_pruning(model, PruningConfig({"ffn": 0.5}, criterion="l1"), Inputs(None, None))
    neurons = count(model.model.layers[0].mlp.parameters()) / 2 * len(model.model.layers)
    assert bytes_after(model, [preview]) == pytest.approx(4 * (count(model.parameters()) - neurons))
