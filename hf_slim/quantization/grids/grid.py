"""Grids: the values that a tensor may take, and how it is divided into slices that share a scale."""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_slim.core.config import SlimConfig, require_whole
from hf_slim.core.errors import SlimConfigError
from hf_slim.core.registry import Registry

GRANULARITIES = ("tensor", "channel", "group", "token")
ROUNDINGS = ("nearest", "floor")
TINY = torch.finfo(torch.float32).tiny  # the smallest scale: a slice of zeros gets codes of zero instead of NaN


class GridKind:
    """Functions of one family of grids, for values in grid units: divided by their scale, plus their zero point.

    Attributes:
        bits: Allowed values of `Grid.bits`; the first is the default.
        holds_zero: Whether zero is always on the grid, so that masked weights remain zero.
        ignores_zeros: Whether scales are the same, bit for bit, with and without the zeros among the values.
        in_place: Whether `snap_` allocates no memory; other families get a weight in small chunks.
        learns_codebook: Whether the grid's values are trained with the weights.
    """

    bits: tuple[int, ...] = (8, 7, 6, 5, 4, 3, 2)
    holds_zero = True
    ignores_zeros = True
    in_place = False
    learns_codebook = False

    def observe(self, values: Tensor, dims: tuple[int, ...], grid: "Grid") -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (None: 0) that cover `values`, float32, with size 1 in the dimensions `dims`."""
        raise NotImplementedError

    def snap_(self, scaled: Tensor, grid: "Grid", codebook: Tensor | None) -> Tensor:
        """The nearest grid value of each value in `scaled`, float32; may reuse the memory of `scaled`."""
        return self.decode(self.encode(scaled, grid, codebook), grid, codebook)

    def encode(self, scaled: Tensor, grid: "Grid", codebook: Tensor | None) -> Tensor:
        """Codes of `scaled`, uint8, each below 2**bits."""
        raise NotImplementedError

    def decode(self, codes: Tensor, grid: "Grid", codebook: Tensor | None) -> Tensor:
        """The grid values of uint8 codes, float32; equal to the result of `snap_`, bit for bit."""
        raise NotImplementedError

    def limits(self, grid: "Grid") -> tuple[float, float]:
        """The smallest and the largest value of the grid, in grid units."""
        raise NotImplementedError

    def storage_bits(self, grid: "Grid") -> float:
        """Bits that one code takes on disk."""
        return grid.bits


GRIDS: Registry[GridKind] = Registry("grid")


@dataclass(frozen=True)
class Grid(SlimConfig):
    """The values that a tensor may take. It is stored as codes with scales, some grids also zero points or a codebook.

    Integer grids are affine: `code = round(x * Q + B)`, with Q = 1 / scale, B the zero point, and rounding to nearest
    or down.
    """

    kind: str = field(default="int", metadata={"choices": GRIDS})
    """Family of the grid: a registered grid kind. `int` are evenly spaced integers."""

    bits: int | None = None
    """Bits of one code; which numbers are allowed depends on the kind (`int`: 2 to 8). `null`: the kind's default, 8
    for `int`."""

    granularity: str = field(default="channel", metadata={"choices": GRANULARITIES})
    """Which values share one scale: the whole `tensor`, one output `channel`, one `group` of inputs of a channel, or,
    for activations, one `token`."""

    group_size: int | None = None
    """Input features in one group, a whole number of at least 1; required by granularity `group`, and not allowed with
    another one."""

    symmetric: bool = True
    """Whether the zero point is 0. `false` stores a zero point with each scale; integer grids only."""

    signed: bool = True
    """Whether codes are signed, from `-2**(bits - 1)` to `2**(bits - 1) - 1`. `false`: from 0 to `2**bits - 1`;
    integer grids only."""

    rounding: str = field(default="nearest", metadata={"choices": ROUNDINGS})
    """How a value between two codes is rounded: `nearest` (half to even) or `floor`; `floor` is for integer grids
    only."""

    scale: float | None = None
    """A fixed width of one step, 1 / Q, positive. `null`: scales are found by the observer."""

    zero_point: float | None = None
    """A fixed zero point, B, in units of the step. Needs a fixed `scale` and `symmetric: false`. `null`: it is found
    by the observer where the grid has one."""

    codebook_channels: int | None = None
    """Output channels that share one learned codebook, a whole number of at least 1 that divides the output channels.
    `null`: one codebook for the whole weight. Used by kind `codebook` only."""

    def __post_init__(self) -> None:
        allowed = GRIDS[self.kind].bits
        object.__setattr__(self, "bits", allowed[0] if self.bits is None else self.bits)
        if self.bits not in allowed:
            raise SlimConfigError(
                f"A grid of kind '{self.kind}' has {_any_of(sorted(allowed))} bits, got {self.bits!r}."
            )
        for name, value, choices in (
            ("granularity", self.granularity, GRANULARITIES),
            ("rounding", self.rounding, ROUNDINGS),
        ):
            if value not in choices:
                raise SlimConfigError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
        if self.granularity == "group":
            require_whole("group_size", self.group_size)
        elif self.group_size is not None:
            raise SlimConfigError(
                f"`group_size` {self.group_size} needs granularity 'group', got '{self.granularity}'. Drop one."
            )
        if self.codebook_channels is not None:
            require_whole("codebook_channels", self.codebook_channels)
        if self.scale is not None and not (self.scale > 0 and self.scale < float("inf")):
            raise SlimConfigError(
                f"`scale` must be positive and finite, got {self.scale}. It is the width of one step, 1/Q."
            )
        affine = not self.symmetric or not self.signed or self.rounding == "floor" or self.zero_point is not None
        if affine and self.kind != "int":
            raise SlimConfigError(
                f"Zero points, unsigned codes and `rounding: floor` belong to integer grids, not to '{self.kind}'."
            )
        if self.zero_point is not None and (self.scale is None or self.symmetric):
            raise SlimConfigError("A given `zero_point` needs a given `scale` and `symmetric: false`.")

    @property
    def kind_of(self) -> GridKind:
        """The functions of this family of grids."""
        return GRIDS[self.kind]

    @property
    def storage_bits(self) -> float:
        """Bits that one code takes on disk, scales not counted."""
        return self.kind_of.storage_bits(self)

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of stored scales. Scales are rounded to it before use, so that training uses the stored ones.

        Grids of few bits in groups have many scales: bfloat16 halves their size, and int4 kernels require it. With
        more bits the rounding error of bfloat16, 2**-9 of the range, would be noticeable.
        """
        few_bits = self.kind == "int" and self.granularity == "group" and self.bits <= 4
        return torch.bfloat16 if few_bits else torch.float32

    def groups(self, in_features: int) -> int:
        """Groups per output channel; the last one may be short in a pruned layer."""
        return -(-in_features // self.group_size) if self.group_size else 1

    def with_groups(self, group_size: int) -> "Grid":
        """The same grid with a scale for each `group_size` input features."""
        return dataclasses.replace(self, granularity="group", group_size=group_size)

    def bits_per_value(self, in_features: int) -> float:
        """Bits per value with its share of scales (and zero points), for rows of `in_features`."""
        if self.granularity == "tensor":
            return self.storage_bits
        slice_size = self.group_size or max(in_features, 1)
        return self.storage_bits + self.scale_dtype.itemsize * 8 * (1 if self.symmetric else 2) / slice_size


@dataclass(frozen=True)
class GridState:
    """Scales, zero points and codebook of one tensor; scales and zero points broadcast over its grouped form.

    Attributes:
        scale: float32, positive: the width of one step.
        zero_point: float32, or None for 0; a value is `(grid value - zero_point) * scale`.
        codebook: float32 `(n_codebooks, 2**bits)`, ascending, or None if the grid has fixed values.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    codebook: Tensor | None = None


def observed_state(values: Tensor, grid: Grid, dims: tuple[int, ...] = (-1,)) -> GridState:
    """The state that covers every value (the min-max observer), or the fixed state of the grid if it has one.

    Args:
        values: float32; the slices that share a scale run along `dims`.
    """
    if grid.scale is not None:
        scale = values.new_tensor(grid.scale, dtype=torch.float32)
        return GridState(scale, None if grid.zero_point is None else torch.full_like(scale, grid.zero_point))
    return GridState(*grid.kind_of.observe(values, dims, grid))


def snapped(values: Tensor, grid: Grid, state: GridState) -> Tensor:
    """`values` (float32) rounded to the nearest values of the grid, float32."""
    return restored(snapped_in_units(values, grid, state), state)


def snapped_in_units(values: Tensor, grid: Grid, state: GridState) -> Tensor:
    """`snapped` in units of the grid: for integer grids without zero point, the signed codes as float32."""
    return grid.kind_of.snap_(in_grid_units(values, state), grid, state.codebook)


def encoded(values: Tensor, grid: Grid, state: GridState) -> Tensor:
    """Codes of `values`, uint8, same shape."""
    return grid.kind_of.encode(in_grid_units(values, state), grid, state.codebook)


def decoded(codes: Tensor, grid: Grid, state: GridState) -> Tensor:
    """The values of uint8 codes, float32; equal to `snapped`, bit for bit."""
    return restored(grid.kind_of.decode(codes, grid, state.codebook), state)


def restored(in_units: Tensor, state: GridState) -> Tensor:
    """The inverse of `in_grid_units`, in place: minus the zero point, times the scale."""
    if state.zero_point is not None:
        in_units = in_units.sub_(state.zero_point)
    return in_units.mul_(state.scale)


def as_stored(values: Tensor, grid: Grid) -> Tensor:
    """Scales or zero points (float32) rounded to the dtype of their storage, as float32."""
    if grid.scale_dtype == torch.float32:
        return values
    # rounds to bfloat16 with integer operations, half to even: compilers remove a cast to bfloat16 and back
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


def in_grid_units(values: Tensor, state: GridState) -> Tensor:
    """`values` in grid units: divided by their scale, plus their zero point."""
    scaled = values * state.scale.reciprocal()  # x * Q, not x / scale: rounds as bitsandbytes and torchao do
    return scaled if state.zero_point is None else scaled.add_(state.zero_point)


def _any_of(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers)) if len(numbers) < 3 else f"{numbers[0]} to {numbers[-1]}"
