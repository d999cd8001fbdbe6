"""Stand-ins for packed layers whose forward traces to ONNX operators that hold the trained codes.

They compute nothing in PyTorch: operators of ONNX Runtime appear there as tensors of zeros.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from hf_slim.export.graphs.matrices import SIGN, Blocks, Integers, unpacked_blocks
from hf_slim.export.graphs.rounding import rounded, static_state
from hf_slim.quantization.grids.grid import TINY
from hf_slim.quantization.layers.packed import PackedLinear

EXACT = 0  # accuracy_level of MatMulNBits: activations stay float32


class BlockLinear(nn.Module):
    """`com.microsoft::MatMulNBits` on float32 inputs, which are rounded before where the scheme says so."""

    def __init__(self, layer: PackedLinear, matrix: Blocks):
        super().__init__()
        self.grid, self.bias = layer.scheme.activations, bias_of(layer)
        self.rows, self.columns, self.bits, self.block = len(matrix.codes), matrix.columns, matrix.bits, matrix.block
        hold_(self, codes=matrix.codes, scale=matrix.scale)
        keep_input_state_(self, layer)

    def forward(self, input: Tensor) -> Tensor:
        """The output of the layer, to a tracer."""
        if self.grid is not None:
            input = rounded(input, self.grid, (-1,), static_state(self, self.grid))
        sizes = {"K": self.columns, "N": self.rows, "bits": self.bits, "block_size": self.block}
        attributes = sizes | {"accuracy_level": EXACT}
        shape = (*input.shape[:-1], self.rows)
        given = (input, self.codes, self.scale)
        product = symbolic("com.microsoft::MatMulNBits", given, attributes, dtype=input.dtype, shape=shape, version=1)
        return product if self.bias is None else product + self.bias


class IntegerLinear(nn.Module):
    """`MatMulInteger` on codes of both sides: `kernels.cpu` step by step, so that one layer is equal bit for bit.

    Codes are stored with 128 added: ONNX Runtime multiplies uint8 ten times as fast as int8 on x86.
    """

    def __init__(self, layer: PackedLinear, matrix: Integers):
        super().__init__()
        self.grid, self.bias = layer.scheme.activations, bias_of(layer)
        hold_(self, codes=matrix.codes, scale=matrix.scale)
        hold_(self, zero=torch.tensor(SIGN, dtype=torch.uint8), two=torch.tensor(2.0))
        keep_input_state_(self, layer)

    def forward(self, input: Tensor) -> Tensor:
        """The output of the layer, to a tracer."""
        low, high = self.grid.kind_of.limits(self.grid)
        scale = self._input_scale(input)
        # Training rounds x * (1 / s). ONNX Runtime makes x / s of that (DivMulFusion), which gives other codes now and
        # then; 2 / s is not touched, and halving is exact.
        inverse = torch.div(self.two, scale) * 0.5
        whole = (input * inverse).round().clamp(low, high)
        given = ((whole + SIGN).to(torch.uint8), self.codes, self.zero, self.zero)
        shape = (*input.shape[:-1], self.codes.shape[1])
        product = symbolic("MatMulInteger", given, dtype=torch.int32, shape=shape, version=10)
        output = product.to(torch.float32) * scale * self.scale
        return output if self.bias is None else output + self.bias

    def _input_scale(self, input: Tensor) -> Tensor:
        state = static_state(self, self.grid)
        if state is not None:
            return state.scale
        steps = 2**self.grid.bits - 1
        return (input.abs().amax(-1, keepdim=True) / (steps / 2)).clamp_min(TINY)


class BlockEmbedding(nn.Module):
    """Rows of a matrix in blocks; shares its tensors with the head that it is tied to."""

    def __init__(self, matrix: Blocks):
        super().__init__()
        self.columns, self.bits = matrix.columns, matrix.bits
        hold_(self, codes=matrix.codes, scale=matrix.scale)

    def forward(self, input: Tensor) -> Tensor:
        """The rows of the tokens `input`."""
        tokens = input.flatten()
        codes = unpacked_blocks(self.codes.index_select(0, tokens), self.bits) - 2 ** (self.bits - 1)
        rows = codes * self.scale.index_select(0, tokens).unsqueeze(-1)
        return rows.flatten(1)[:, : self.columns].view(*input.shape, self.columns)


class IntegerEmbedding(nn.Module):
    """Columns of a matrix for `MatMulInteger`, with which a tied head multiplies."""

    def __init__(self, matrix: Integers):
        super().__init__()
        hold_(self, codes=matrix.codes, scale=matrix.scale)

    def forward(self, input: Tensor) -> Tensor:
        """The rows of the tokens `input`."""
        tokens = input.flatten()
        codes = self.codes.index_select(1, tokens).t().float() - SIGN
        rows = codes * self.scale.index_select(0, tokens).unsqueeze(-1)
        return rows.view(*input.shape, -1)


class FloatLinear(nn.Module):
    """A linear layer with the float32 values of its codes, for grids that no operator holds."""

    def __init__(self, layer: PackedLinear, weight: Tensor):
        super().__init__()
        self.grid, self.bias = layer.scheme.activations, bias_of(layer)
        self.weight = nn.Parameter(weight, requires_grad=False)
        keep_input_state_(self, layer)

    def forward(self, input: Tensor) -> Tensor:
        """The output of the layer."""
        if self.grid is not None:
            input = rounded(input, self.grid, (-1,), static_state(self, self.grid))
        return F.linear(input, self.weight, self.bias)


def hold_(stand_in: nn.Module, **tensors: Tensor) -> None:
    """Gives a stand-in these very tensors as buffers: what two of them share is one tensor of the graph."""
    for name, tensor in tensors.items():
        stand_in.register_buffer(name, tensor)


def bias_of(layer: PackedLinear) -> Any:
    """The bias of a layer as a float32 parameter, or None."""
    return None if layer.bias is None else nn.Parameter(layer.bias.detach().float().cpu(), requires_grad=False)


def keep_input_state_(stand_in: nn.Module, layer: PackedLinear) -> None:
    """Gives a stand-in the static input scale of its layer, if that has one."""
    for name in ("input_scale", "input_zero_point"):
        if name in layer._buffers:
            stand_in.register_buffer(name, layer._buffers[name].cpu())


def float_embedding(weight: Tensor) -> nn.Embedding:
    """An ordinary embedding with these float32 rows."""
    return nn.Embedding.from_pretrained(weight, freeze=True)
