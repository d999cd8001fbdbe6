"""Codes, scales and zero points of packed layers in the layouts of other libraries, and back: never through floats."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_slim.core.host import parameter_or_none
from hf_slim.quantization.grids.grid import Grid
from hf_slim.quantization.grids.packing import pack_codes, unpack_codes

WORD_BYTES = 4  # of an int32
Layer = Any  # a packed layer: an `nn.Module` that is a `PackedLayer` too


def stored_codes(layer: Layer) -> Tensor:
    """The codes of a packed layer's weight: `(rows, columns)`, uint8, each below 2**bits."""
    grid, columns = layer.scheme.weights, layer.float_shape("weight")[1]
    codes = unpack_codes(layer._parameters["weight"], grid.storage_bits, grid.group_size or columns)
    return codes.flatten(1)[:, :columns]


def as_stored_codes(codes: Tensor, grid: Grid) -> Tensor:
    """The inverse of `stored_codes`: the weight of a packed layer, int8 `(rows, n_groups, n_bytes)`.

    Args:
        codes: `(rows, columns)`, uint8; columns are whole groups.
    """
    return pack_codes(codes.reshape(len(codes), grid.groups(codes.shape[1]), -1), grid.storage_bits)


def signed_codes(layer: Layer) -> Tensor:
    """The codes of an integer weight from `-2**(bits - 1)`: `(rows, columns)`, int8.

    A value is `(code - zero point) * scale`, with the zero points of `signed_zero_points`.
    """
    grid, codes = layer.scheme.weights, stored_codes(layer)
    if not grid.signed:
        return (codes.short() - half(grid)).to(torch.int8)
    unused = 8 - grid.bits  # shifted out and back as signed bytes: the sign comes back by itself
    return (codes << unused).view(torch.int8) >> unused


def from_signed_codes(codes: Tensor, grid: Grid) -> Tensor:
    """The inverse of `signed_codes`: the weight of a packed layer, int8 `(rows, n_groups, n_bytes)`."""
    shifted = codes.short() + (0 if grid.signed else half(grid))
    return as_stored_codes(shifted.bitwise_and_(2 ** bits_of(grid) - 1).to(torch.uint8), grid)


def row_scales(layer: Layer) -> Tensor:
    """The scales of a packed layer's weight for every row: `(rows, n_groups)`, in the dtype of their storage."""
    grid, (rows, columns) = layer.scheme.weights, layer.float_shape("weight")
    scale = parameter_or_none(layer, "weight_scale")
    if scale is None:  # the grid fixes it
        scale = torch.full((1, 1), grid.scale, dtype=torch.float32, device=layer._parameters["weight"].device)
    return scale.expand(rows, grid.groups(columns)).clone(memory_format=torch.contiguous_format)


def own_scales(layer: Layer, scales: Tensor) -> Tensor:
    """The inverse of `row_scales`: one scale for all where the layer has one."""
    return scales[:1, :1].contiguous() if layer.scheme.weights.granularity == "tensor" else scales


def signed_zero_points(layer: Layer) -> Tensor | None:
    """The zero points that belong to `signed_codes`: `(rows, n_groups)`, float32; None: all are 0."""
    grid, (rows, columns) = layer.scheme.weights, layer.float_shape("weight")
    if grid.symmetric and grid.signed:
        return None
    points = parameter_or_none(layer, "weight_zero_point")
    if points is None:
        points = torch.full((1, 1), grid.zero_point or 0.0, device=layer._parameters["weight"].device)
    points = points.float() - (0 if grid.signed else half(grid))
    return points.expand(rows, grid.groups(columns)).contiguous()


def from_signed_zero_points(layer: Layer, points: Tensor) -> Tensor:
    """The inverse of `signed_zero_points`: what the layer's buffer holds."""
    grid = layer.scheme.weights
    points = points.float() + (0 if grid.signed else half(grid))
    return own_scales(layer, points.to(grid.scale_dtype))


def are_whole(layer: Layer) -> bool:
    """Whether the zero points of an integer weight are codes themselves, as formats with integer zero points need."""
    points = signed_zero_points(layer)
    if points is None:
        return True
    low = -half(layer.scheme.weights)
    return bool(((points == points.round()) & (points >= low) & (points < -low)).all())


def half(grid: Grid) -> int:
    """How far apart signed and unsigned codes are."""
    return 2 ** (bits_of(grid) - 1)


def bits_of(grid: Grid) -> int:
    """Bits of one code."""
    return cast(int, grid.bits)  # None only stands for the default of a kind, until the grid is made


def to_bytes(codes: Tensor, bits: int) -> Tensor:
    """Signed codes as bytes, from 0 on, the first in the lowest bits: `(rows, n_bytes)`, uint8.

    Args:
        codes: `(rows, columns)`, int8.
    """
    return pack_codes((codes.short() + 2 ** (bits - 1)).to(torch.uint8), bits).view(torch.uint8)


def from_bytes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `to_bytes`: `(rows, columns)`, int8."""
    codes = unpack_codes(packed.contiguous(), bits, columns)[:, :columns]
    return (codes.short() - 2 ** (bits - 1)).to(torch.int8)


def to_words(codes: Tensor, bits: int) -> Tensor:
    """Signed codes as a dense stream of int32 words, as compressed-tensors packs rows: `(rows, n_words)`."""
    packed = to_bytes(codes, bits)
    return F.pad(packed, (0, -packed.shape[1] % WORD_BYTES)).contiguous().view(torch.int32)


def from_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `to_words`: `(rows, columns)`, int8."""
    return from_bytes(words.contiguous().view(torch.uint8), bits, columns)
