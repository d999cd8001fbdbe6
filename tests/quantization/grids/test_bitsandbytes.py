"""NF4 and FP4 are bitsandbytes' own: what was trained is what a bitsandbytes layer computes with."""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from hf_slim.quantization.grids.fake_quant import fake_quantize_weight
from hf_slim.quantization.scheme import Scheme


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_values_equal_those_of_bitsandbytes(name, block, dtype):
    weight = torch.randn(96, 512).to(dtype)
    weight[3, :block] = 0
    theirs = dequantize_4bit(*quantize_4bit(weight, blocksize=block, quant_type=name, compress_statistics=False))
    ours = fake_quantize_weight(weight, Scheme.parse(f"{name}-g{block}").weights)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_trained_weight_moves_into_a_bitsandbytes_layer_without_a_change(name):
    weight = torch.randn(32, 128)
    trained = fake_quantize_weight(weight, Scheme.parse(name).weights)
    layer = bnb.nn.Linear4bit(128, 32, bias=False, quant_type=name, compress_statistics=False)
    layer.weight = bnb.nn.Params4bit(trained, requires_grad=False, quant_type=name, compress_statistics=False)
    layer = layer.to("cpu")
    assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), trained)
