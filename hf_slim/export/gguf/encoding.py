"""In which format a tensor is written: the smallest that holds its codes, and its scales exactly where one does."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hf_slim.core.errors import SlimError
from hf_slim.export.codes import Codes, codes_of, float_values, is_packed_weight
from hf_slim.export.gguf.blocks import BLOCK, FORMATS, BlockFormat, packed_rows
from hf_slim.export.gguf.layout import Entry

HELD = (
    "GGUF holds exactly: symmetric integers of 2 to 4 bits in groups of 32, 64, 128 or another multiple of 32, such "
    "as w4a16-g32; ternary weights, w1.58a8; floats."
)
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Encoded:
    """One tensor as it lies in the file.

    Attributes:
        name: Of the tensor.
        form: Its format, as `gguf.GGMLQuantizationType` calls it.
        data: Floats of their shape, or rows of bytes.
        count: How many values these are.
        scale: Of the whole matrix, float32, where it is written beside it as a tensor; None: there is none.
        error: By how much the worst scale was rounded, relative to it; 0: every value is exact.
    """

    name: str
    form: str
    data: NDArray[Any]
    count: int
    scale: float | None = None
    error: float = 0.0


def encoded(model: nn.Module, entry: Entry) -> Encoded:
    """A tensor in its format, with its scales rounded to float16 where they are not that already.

    Raises: SlimError: if no format has its range of codes, or its group size.
    """
    if not is_packed_weight(model, entry.path) or entry.float32:
        return _floats(model, entry)
    try:
        codes = codes_of(model, entry.path)
    except SlimError as error:
        raise SlimError(f"{error} {HELD}") from error
    return _blocks(_arranged(codes, entry), entry)


def _floats(model: nn.Module, entry: Entry) -> Encoded:
    values = padded_columns(entry.arranged(float_values(model, entry.path)), entry.columns)
    if values.dim() == 1 or entry.float32 or entry.offset:
        values = values.float() + entry.offset  # llama.cpp adds and multiplies them as float32
    if values.dtype not in FLOATS:
        raise SlimError(f"'{entry.path}' holds {values.dtype}, and GGUF holds float32, float16 and bfloat16.")
    if values.dtype == torch.bfloat16:  # numpy has no bfloat16: as bytes
        return Encoded(entry.name, "BF16", values.contiguous().view(torch.uint8).numpy(), values.numel())
    return Encoded(entry.name, FLOATS[values.dtype], values.contiguous().numpy(), values.numel())


def padded_columns(matrix: torch.Tensor, columns: int | None) -> torch.Tensor:
    """`(rows, columns)`, with zeros for the columns that are missing."""
    return matrix if columns is None else nn.functional.pad(matrix, (0, columns - matrix.shape[1]))


def _arranged(codes: Codes, entry: Entry) -> Codes:
    """The codes of the rows and columns that the file has; added ones are zero, whatever their scale is."""
    if codes.zero_point is not None:
        raise SlimError(f"'{entry.path}' has zero points, and GGUF's exact formats have none. {HELD}")
    numbers = padded_columns(entry.arranged(codes.codes), entry.columns)
    scale, columns = entry.arranged(codes.scale), numbers.shape[1]
    groups = -(-columns // codes.group_size) if codes.scale.shape[1] > 1 else 1
    scale = nn.functional.pad(scale, (0, groups - scale.shape[1]))
    size = codes.group_size if groups > 1 else columns
    return Codes(codes.scheme, tuple(numbers.shape), size, numbers, scale, None)


def _blocks(codes: Codes, entry: Entry) -> Encoded:
    form = _format(codes, entry)
    numbers = codes.codes.numpy()
    used = numbers.reshape(len(numbers), -1, form.columns).any(axis=2)
    scale = np.where(used, codes.scale_in_groups(form.columns).numpy(), np.float32(0))  # zeros need none
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    error = np.abs(half.astype(np.float32) - scale) / np.where(used, scale, np.float32(1))
    worst = float(error.max(initial=0))
    if worst and codes.one_scale and entry.scalable:
        data = packed_rows(numbers, np.ones_like(half), form)
        return Encoded(entry.name, form.name, data, numbers.size, float(codes.scale[0, 0]))
    if not np.isfinite(worst):
        raise SlimError(f"'{entry.path}' has a scale of {scale.max():.3g}, beyond the range of float16. {HELD}")
    return Encoded(entry.name, form.name, packed_rows(numbers, half, form), numbers.size, None, worst)


def _format(codes: Codes, entry: Entry) -> BlockFormat:
    """The smallest format that has the codes' range, and whose blocks fit into rows and groups."""
    grid, columns = codes.scheme.weights, codes.codes.shape[1]
    low, high = grid.kind_of.limits(grid)
    in_range = [form for form in FORMATS if form.holds(low, high)]
    if not in_range:
        raise SlimError(f"'{entry.path}' has codes from {low:g} to {high:g}, and no format of GGUF has. {HELD}")
    if columns % BLOCK:
        raise SlimError(
            f"'{entry.path}' has rows of {columns} values, and GGUF cuts quantized rows into blocks of {BLOCK}. Prune "
            f"with `round_to: {BLOCK}`, or leave this layer in floating point (`ignore`)."
        )
    one_group = codes.scale.shape[1] == 1
    fitting = [f for f in in_range if not columns % f.columns and (one_group or not codes.group_size % f.columns)]
    if not fitting:
        raise SlimError(
            f"'{entry.path}' has groups of {codes.group_size} columns, and GGUF's blocks are {BLOCK} long. {HELD}"
        )
    return fitting[0]
