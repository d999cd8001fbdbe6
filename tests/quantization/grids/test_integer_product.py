"""Layers of integer weights and activations: the same bits in training, in a float copy and in the integer kernel."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_slim import QuantizationConfig, convert, prepare
from hf_slim.quantization.grids.fake_quant import fake_quantize_static, fake_quantize_tokens, fake_quantize_weight
from hf_slim.quantization.grids.integer_product import is_integer_product
from hf_slim.quantization.kernels import cpu as kernels
from tests import tiny

CONFIGS = {
    "w8a8": QuantizationConfig("w8a8"),
    "w4a8": QuantizationConfig("w4a8"),
    "w8a8-tensor": QuantizationConfig("w8a8-tensor"),
    "static": QuantizationConfig("w8a8-static", calibration_batches=1),
    "lsq": QuantizationConfig("w4a8", learn="lsq"),
    "pact": QuantizationConfig("w8a8-static", learn_activations="pact", calibration_batches=1),
    "lsq, static": QuantizationConfig("w8a8-static", learn="lsq", learn_activations="lsq", calibration_batches=1),
    "frozen": QuantizationConfig("w8a8", freeze=0.5),
}


def prepared(name, seed=0, **sizes):
    torch.manual_seed(seed)
    layer = nn.Linear(**({"in_features": 40, "out_features": 24, "bias": seed % 2 == 0} | sizes))
    model = prepare(nn.Sequential(layer), CONFIGS[name]).train()
    model(torch.randn(16, layer.in_features))  # static scales need data
    return model


def values_product(layer, input):
    """The layer as the product of the values that the codes stand for, by the functions for values."""
    quantizer, grid = layer.input_quantizer, layer.input_quantizer.grid
    if not quantizer.static:
        rounded = fake_quantize_tokens(input, grid)
    else:
        scale = quantizer.scale if quantizer.learn else quantizer.state().scale
        rule = "pact" if quantizer.learn == "pact" else "lsq"
        rounded = fake_quantize_static(input, grid, scale, None, None, rule)
    weight = fake_quantize_weight(layer.weight, layer.scheme.weights, layer.weight_quantizer.scale)
    return F.linear(rounded, weight, layer.bias)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_value_and_every_gradient_are_those_of_the_product_of_values(name, seed):
    model = prepared(name, seed)
    twin, input = copy.deepcopy(model), torch.randn(3, 5, 40)
    upstream, found = torch.randn(3, 5, 24), []
    assert is_integer_product(model[0].scheme.weights, model[0].scheme.activations)
    for layer, forward in ((model[0], lambda x: model[0](x)), (twin[0], lambda x: values_product(twin[0], x))):
        x = input.clone().requires_grad_()
        output = forward(x)
        output.backward(upstream)
        found.append({"output": output.detach(), "input": x.grad, **{n: p.grad for n, p in layer.named_parameters()}})
    codes, values = found
    assert codes.keys() == values.keys()
    for key, value in values.items():
        torch.testing.assert_close(codes[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("sizes", [(40, 24), (48, 32), (129, 7), (1, 1), (1500, 64)])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_trained_packed_and_copied_layers_give_the_same_bits(name, sizes, monkeypatch):
    monkeypatch.setattr(kernels, "HAS_FAST_INTEGERS", True)
    model = prepared(name, in_features=sizes[0], out_features=sizes[1])
    model(torch.randn(16, sizes[0]))
    inputs = [torch.randn(shape) for shape in ((5, sizes[0]), (2, 3, sizes[0]), (1, sizes[0]))]
    with torch.no_grad():
        trained = [model.eval()(input) for input in inputs]
    packed = convert(model).eval()
    with torch.no_grad():
        assert packed[0].kernel(inputs[0]) == "int8"
        for input, expected in zip(inputs, trained, strict=True):
            assert torch.equal(packed(input), expected)
        tiny.only_reference_kernels(monkeypatch)
        for input, expected in zip(inputs, trained, strict=True):
            assert torch.equal(packed(input), expected)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w8a8-static"])
@pytest.mark.parametrize("family", ["llama", "bert", "qwen3", "gpt2"])
def test_a_whole_model_ships_what_was_trained(family, scheme, monkeypatch):
    monkeypatch.setattr(kernels, "HAS_FAST_INTEGERS", True)
    model = prepare(tiny.ALL_FAMILIES[family](), QuantizationConfig(scheme, calibration_batches=1))
    model.train()(input_ids=tiny.tokens())
    trained = tiny.logits(model.eval())
    assert torch.equal(tiny.logits(convert(model).eval()), trained)
