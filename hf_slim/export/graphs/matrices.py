"""Trained codes in the two orders that ONNX operators multiply with, and which layers have such an order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_slim.export.codes import WHOLE_NUMBERS, Codes
from hf_slim.quantization.grids.grid import Grid
from hf_slim.quantization.scheme import Scheme

WIDTHS = (2, 4, 8)  # bits of a stored code
BLOCKS = (512, 256, 128, 64, 32, 16)  # columns that share a stored scale
SIGN = 128  # what is added to a signed code of 8 bits to store it unsigned, and subtracted by the operator


@dataclass(frozen=True)
class Blocks:
    """A matrix for `com.microsoft::MatMulNBits` without zero points: value = (code - 2**(bits - 1)) * scale.

    Attributes:
        codes: uint8 `(rows, n_blocks, block * bits / 8)`, the first code in the lowest bits.
        scale: float32 `(rows, n_blocks)`.
        columns: Of the matrix; the last block may reach beyond it.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    block: int
    columns: int


@dataclass(frozen=True)
class Integers:
    """A matrix for `MatMulInteger` with zero point 128: value = (code - 128) * scale.

    Attributes:
        codes: uint8 `(columns, rows)`.
        scale: float32 `(rows,)`.
    """

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Groups:
    """A matrix as plain arithmetic computes it: value = code * scale.

    Attributes:
        codes: int8 `(rows, columns)`, or `(rows, n_groups, group_size)` where groups have scales of their own.
        scale: float32 `(rows, 1)`, or `(rows, n_groups, 1)`.
    """

    codes: Tensor
    scale: Tensor


Matrix = Blocks | Integers | Groups | Tensor  # the last: float32 values


def width_of(grid: Grid) -> int | None:
    """Bits in which a grid's codes can be stored as signed numbers without zero points; None if they cannot."""
    if grid.kind not in WHOLE_NUMBERS or not grid.symmetric:
        return None
    low, high = grid.kind_of.limits(grid)
    return next((bits for bits in WIDTHS if low >= -(2 ** (bits - 1)) and high < 2 ** (bits - 1)), None)


def block_of(grid: Grid, columns: int) -> int | None:
    """The largest block that cuts a grid's groups into whole ones, or rows where these have one scale; None: none.

    A row that no block divides is padded, with blocks of 32.
    """
    if grid.group_size is None or grid.group_size >= columns:
        return next((block for block in BLOCKS if columns % block == 0), 32)
    return next((block for block in BLOCKS if grid.group_size % block == 0), None)


def multiplies_integers(scheme: Scheme) -> bool:
    """Whether a layer can multiply whole numbers on both sides: one scale per row of the weight, and per input."""
    inputs = scheme.activations
    if inputs is None or inputs.kind != "int" or not (inputs.symmetric and inputs.signed) or inputs.scale is not None:
        return False
    return width_of(scheme.weights) is not None and not scheme.weights.group_size


def as_blocks(codes: Codes) -> Blocks:
    """The codes in blocks. The grid must have a width and a block."""
    grid, (rows, columns) = codes.scheme.weights, codes.codes.shape
    bits, block = width_of(grid), block_of(grid, columns)
    count = -(-columns // block)
    stored = torch.nn.functional.pad(codes.codes, (0, count * block - columns)) + 2 ** (bits - 1)
    per_byte = 8 // bits
    shifts = (2**bits) ** torch.arange(per_byte, dtype=torch.int16)
    packed = (stored.view(rows, count, -1, per_byte) * shifts).sum(-1).to(torch.uint8)
    if codes.scale.shape[1] == 1:
        scale = codes.scale.expand(rows, count)
    else:
        scale = codes.scale.repeat_interleave(codes.group_size // block, dim=1)[:, :count]
    return Blocks(packed.contiguous(), scale.contiguous(), bits, block, columns)


def as_integers(codes: Codes) -> Integers:
    """The codes as 8-bit numbers. The grid must have one scale per row."""
    return Integers((codes.codes + SIGN).to(torch.uint8).t().contiguous(), codes.scale[:, 0].contiguous())


def as_groups(codes: Codes) -> Groups:
    """The codes as signed bytes. The grid must have a width, and its groups must divide the columns."""
    numbers, scale = codes.codes.to(torch.int8), codes.scale.contiguous()
    if scale.shape[1] == 1:
        return Groups(numbers, scale)
    return Groups(numbers.unflatten(1, (scale.shape[1], -1)), scale.unsqueeze(-1))


def values_of(matrix: Blocks | Integers | Groups) -> Tensor:
    """What the operator that reads the matrix makes of it: float32 `(rows, columns)`."""
    if isinstance(matrix, Integers):
        return ((matrix.codes.float() - SIGN) * matrix.scale).t()
    if isinstance(matrix, Groups):
        return (matrix.codes.float() * matrix.scale).flatten(1)
    codes = unpacked_blocks(matrix.codes, matrix.bits)
    return ((codes - 2 ** (matrix.bits - 1)) * matrix.scale.unsqueeze(-1)).flatten(1)[:, : matrix.columns]


def unpacked_blocks(packed: Tensor, bits: int) -> Tensor:
    """The stored codes of bytes, as whole float32 numbers: `(..., n_bytes)` -> `(..., n_bytes * 8 / bits)`.

    By arithmetic, which every runtime has, instead of shifts of bytes, which not all have.
    """
    rest, parts = packed.float(), []
    for _ in range(8 // bits - 1):
        higher = (rest / 2**bits).floor()
        parts.append(rest - higher * 2**bits)
        rest = higher
    return torch.stack((*parts, rest), dim=-1).flatten(-2)
