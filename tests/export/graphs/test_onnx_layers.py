"""Stand-ins for packed layers compute in ONNX Runtime what the layers compute in PyTorch."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

from hf_slim.export.codes import codes_of, float_values
from hf_slim.export.graphs import onnx_layers
from hf_slim.export.graphs.matrices import as_blocks, as_integers
from hf_slim.quantization.layers.packed import PackedLinear
from hf_slim.quantization.layers.training import with_class
from tests import tiny
from tests.export.graphs.mixed import packed_layer

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} missing: pip install 'hf_slim[onnx]'")
COLUMNS, ROWS = 64, 40
INTEGERS = ("w8a8", "w4a8", "w8a4", "w1.58a8", "w8a8-tensor", "w8a8-static")
BLOCKS = ("w2a16-g16", "w3a16-g32", "w4a16-g16", "w4a16-g64", "w8a16", "w4a8-g32")


class Bench(nn.Module):
    """Many layers on one input, so that one export is enough for all."""

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers.values())

    def forward(self, input: torch.Tensor) -> list[torch.Tensor]:
        return [layer(input) for layer in self.layers]


def layers() -> dict[str, PackedLinear]:
    inputs = torch.randn(32, COLUMNS)
    return {scheme: packed_layer(nn.Linear(COLUMNS, ROWS), scheme, inputs) for scheme in (*INTEGERS, *BLOCKS)}


def stand_in(scheme: str, layer: PackedLinear) -> nn.Module:
    codes = codes_of(nn.Sequential(layer), "0.weight")
    if scheme in INTEGERS:
        return onnx_layers.IntegerLinear(layer, as_integers(codes))
    return onnx_layers.BlockLinear(layer, as_blocks(codes))


def in_onnxruntime(module: nn.Module, example: torch.Tensor, *inputs: torch.Tensor) -> list[list[np.ndarray]]:
    import onnxruntime

    sizes = (dict.fromkeys(range(example.dim() - example.is_floating_point()), torch.export.Dim.AUTO),)
    program = torch.onnx.export(module, (example,), dynamic_shapes=sizes, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [session.run(None, {name: one.numpy()}) for one in inputs]


@pytest.mark.slow
@needs_onnx
@torch.no_grad()
def test_one_layer_of_every_scheme_computes_the_same(monkeypatch):
    packed = layers()
    bench = Bench({scheme: stand_in(scheme, layer) for scheme, layer in packed.items()}).eval()
    inputs = [torch.randn(3, 7, COLUMNS) * 10, torch.randn(1, 1, COLUMNS) * 1e-3]
    inputs[0][1, 2] = 0  # whose scale is the smallest number, and not 0 / 0
    for input, outputs in zip(inputs, in_onnxruntime(bench, torch.randn(2, 5, COLUMNS), *inputs), strict=True):
        for (scheme, layer), output in zip(packed.items(), outputs, strict=True):
            expected, found = layer(input), torch.from_numpy(output)
            if scheme in INTEGERS and layer.kernel(input) == "int8":
                assert torch.equal(found, expected), scheme
            else:
                assert (found - expected).abs().max() <= 2e-6 * expected.abs().max(), scheme


@pytest.mark.slow
@needs_onnx
@torch.no_grad()
def test_rows_of_an_embedding_are_equal_bit_for_bit():
    inputs = [tiny.tokens(3, 5), tiny.tokens(1, 1)]
    stand_ins, expected = {}, {}
    for scheme in ("w8a16", "w4a16-g16", "w2a16-g16"):
        model = nn.Sequential(packed_layer(nn.Embedding(tiny.VOCAB_SIZE, COLUMNS), scheme))
        codes = codes_of(model, "0.weight")
        expected[scheme] = model[0]
        stand_ins[scheme] = onnx_layers.BlockEmbedding(as_blocks(codes))
        if scheme == "w8a16":
            stand_ins["integers"], expected["integers"] = onnx_layers.IntegerEmbedding(as_integers(codes)), model[0]
    bench = Bench(stand_ins).eval()
    assert all(torch.equal(bench(ids)[i], layer(ids)) for ids in inputs for i, layer in enumerate(expected.values()))
    for ids, outputs in zip(inputs, in_onnxruntime(bench, tiny.tokens(2, 4), *inputs), strict=True):
        for layer, output in zip(expected.values(), outputs, strict=True):
            assert torch.equal(torch.from_numpy(output), layer(ids))


def test_a_layer_in_floats_computes_the_same_in_pytorch():
    for scheme in ("nf4", "codebook3", "fp8", "w8a8-asym"):
        model = nn.Sequential(packed_layer(nn.Linear(COLUMNS, ROWS), scheme))
        layer = onnx_layers.FloatLinear(model[0], float_values(model, "0.weight"))
        input = torch.randn(3, COLUMNS)
        assert torch.equal(layer(input), model[0](input))


def test_a_bias_is_kept():
    layer = layers()["w8a8"]
    twin = with_class(layer, PackedLinear)
    twin.bias = None
    assert torch.equal(stand_in("w8a8", layer).bias, layer.bias)
    assert stand_in("w8a8", twin).bias is None
