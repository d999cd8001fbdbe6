import pytest
import torch
from torch import nn

from hf_slim import QuantizationConfig, convert, prepare
from hf_slim.quantization.grids.fake_quant import quantize_tokens
from hf_slim.quantization.kernels import cpu as kernels
from tests import tiny

CASES = [  # scheme, dtype, tokens, kernel, relative error that its rounding allows
    ("w8a8", torch.float32, 5, "int8", 1e-5),
    ("w8a8", torch.bfloat16, 5, "int8", 1e-2),
    ("w8a8-tensor", torch.float32, 5, "int8", 1e-5),
    ("w8a8-static", torch.float32, 5, "int8", 1e-5),
    ("w4a8", torch.float32, 5, "int8", 1e-5),
    ("w3a8", torch.float32, 5, "int8", 1e-5),
    ("w4a16-g32", torch.bfloat16, 1, "int4", 2e-2),
    ("w4a16-g64", torch.bfloat16, 8, "int4", 2e-2),
    ("w8a16", torch.bfloat16, 1, "int8 weights", 2e-2),
    ("w4a16-g32", torch.bfloat16, 100, "dequantize", 0),
    ("w4a16-g32", torch.float32, 1, "dequantize", 0),
    ("w8a8-asym", torch.float32, 5, "dequantize", 0),
    ("w4a8-g32", torch.float32, 5, "dequantize", 0),
    ("nf4", torch.bfloat16, 1, "dequantize", 0),
]


@pytest.fixture(autouse=True)
def kernels_are_chosen_on_every_processor(monkeypatch):
    """Torch computes these operators on every processor; hf_slim chooses them only where they are fast."""
    monkeypatch.setattr(kernels, "HAS_FAST_INTEGERS", True)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w8a16"])
@torch.no_grad()
def test_without_fast_integers_layers_are_dequantized(scheme, monkeypatch):
    monkeypatch.setattr(kernels, "HAS_FAST_INTEGERS", False)
    layer, activations = packed_layer(scheme, torch.bfloat16), torch.randn(2, 128).bfloat16()
    assert layer.kernel(activations) == "dequantize"
    rounded = kernels.quantized_input(layer, activations) if layer.scheme.activations else activations
    expected = rounded.double() @ layer.dequantized(torch.bfloat16).double().t() + layer.bias.double()
    assert (layer(activations).double() - expected).norm() <= 1e-2 * expected.norm()


def packed_layer(scheme, dtype, bias=True, out_features=48):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, out_features, bias=bias)).to(dtype)
    prepare(model, QuantizationConfig(scheme, calibration_batches=1))
    model.train()(torch.randn(16, 128, dtype=dtype))  # static scales need to see something
    return convert(model)[0].eval()


@pytest.mark.parametrize(("scheme", "dtype", "n_tokens", "kernel", "tolerance"), CASES)
@torch.no_grad()
def test_a_kernel_agrees_with_the_float_copy_within_its_rounding(
    scheme, dtype, n_tokens, kernel, tolerance, monkeypatch
):
    layer = packed_layer(scheme, dtype)
    activations = torch.randn(n_tokens, 128).to(dtype)
    assert layer.kernel(activations) == kernel
    fast = layer(activations)
    with monkeypatch.context() as for_now:
        tiny.only_reference_kernels(for_now)
        reference = layer(activations)
    assert fast.dtype == reference.dtype
    assert (fast.double() - reference.double()).norm() <= tolerance * reference.double().norm()
    assert torch.equal(layer(activations), fast)  # once more, with what the first call arranged


@pytest.mark.parametrize("in_features", [40, 72, 184])
@torch.no_grad()
def test_int8_weights_with_a_width_that_the_kernel_does_not_take_are_dequantized(in_features):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(in_features, 48)).bfloat16()
    layer = convert(prepare(model, QuantizationConfig("w8a16")))[0].eval()
    activations = torch.randn(1, in_features).bfloat16()
    assert layer.kernel(activations) == "dequantize"
    assert layer(activations).isfinite().all()


@torch.no_grad()
def test_int8_weights_at_an_odd_address_compute_the_same():
    """With a number of rows that is no multiple of 4, torch's kernel crashed on them."""
    layer = packed_layer("w8a16", torch.bfloat16, out_features=45)
    activations = torch.randn(1, 128).bfloat16()
    assert layer.kernel(activations) == "int8 weights"
    buffer = torch.empty(layer.weight.numel() + 32, dtype=torch.int8)
    start = 4 + -buffer.data_ptr() % 16  # 4 bytes into a block of 16, as a mapped file may put them
    codes = buffer[start : start + layer.weight.numel()].view(layer.weight.shape).copy_(layer.weight)
    expected = layer(activations)
    layer.weight, layer.kernel_cache = nn.Parameter(codes, requires_grad=False), None
    assert torch.equal(layer(activations), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "dtype", "n_tokens"), [case[:3] for case in CASES if case[3] != "dequantize"])
@torch.no_grad()
def test_compiled_layers_are_one_graph_and_agree(scheme, dtype, n_tokens):
    torch.compiler.reset()
    layer = packed_layer(scheme, dtype)
    activations = torch.randn(n_tokens, 128).to(dtype)
    eager = layer(activations)
    compiled = torch.compile(layer, fullgraph=True)(activations)
    assert (compiled.double() - eager.double()).norm() <= 1e-2 * eager.double().norm()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "nf4", "codebook3"])
def test_compiled_training_is_one_graph_and_agrees(scheme):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = prepare(nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)), QuantizationConfig(scheme))
    inputs, gradients = torch.randn(4, 128), []
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        forward(inputs).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        assert (compiled - eager).norm() <= 2e-2 * eager.norm()


def test_gradients_reach_the_input_of_a_packed_layer():
    layer = packed_layer("w8a8", torch.float32)
    activations = torch.randn(2, 128, requires_grad=True)
    assert layer.kernel(activations) == "dequantize"
    layer(activations).sum().backward()
    torch.testing.assert_close(activations.grad, layer.dequantized(torch.float32).sum(0).expand(2, -1))


@torch.no_grad()
def test_int8_agrees_with_exact_integers():
    layer = packed_layer("w8a8", torch.float32)
    activations = torch.randn(2, 3, 128)
    codes, step = quantize_tokens(activations, layer.scheme.activations)
    sums = codes.double() @ layer.weight.squeeze(1).double().t()
    expected = sums * step.double() * layer.weight_scale.view(-1).double() + layer.bias.double()
    torch.testing.assert_close(layer(activations).double(), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_every_shape_of_input_is_served():
    layer = packed_layer("w8a8", torch.float32)
    for shape in ((128,), (1, 128), (2, 3, 128), (0, 128)):
        assert layer(torch.zeros(shape)).shape == (*shape[:-1], 48)


def test_the_reference_comes_last_and_always_fits():
    assert kernels.KERNELS[-1].name == "dequantize"
    assert kernels.KERNELS[-1].fits(None, None)
