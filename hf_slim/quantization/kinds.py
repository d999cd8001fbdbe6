"""The families of grids: integers, ternary, 8-bit floats, and codebooks that are given or learned."""

import torch
from torch import Tensor

from hf_slim.quantization.grid import GRIDS, TINY, Grid, GridKind

# A value that lies on the grid can come out of `x * Q + B` a rounding error below it (at most 2**-15 for
# codes below 256); `floor` would then drop a whole step, and quantizing twice would differ from quantizing once.
FLOOR_TOLERANCE = 2**-12

# Dettmers et al. 2023, QLoRA, arXiv:2305.14314, appendix E; as bitsandbytes has them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' 4-bit floats by code: a sign bit, two exponent bits, one of mantissa; scaled into [-1, 1]
_FP4_POSITIVE = tuple(value / 12 for value in (0, 2**-4, 8, 12, 4, 6, 2, 3))
FP4 = (*_FP4_POSITIVE, *(-value for value in _FP4_POSITIVE))


def absolute_maximum(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The largest magnitude along `dims`, float32, sizes kept."""
    # two reductions without a temporary copy: on CPU many times faster than `vector_norm` or `aminmax`
    return torch.maximum(values.amax(dims, keepdim=True), values.amin(dims, keepdim=True).neg()).float()


class IntegerGrid(GridKind):
    """Whole numbers. Symmetric scales are absmax / 127.5 for 8 bits, as compressed-tensors has them.

    Source: Jacob et al. 2018, arXiv:1712.05877, eq. 1 and sec. 3.
    """

    def limits(self, grid: Grid) -> tuple[float, float]:
        low = -(2 ** (grid.bits - 1)) if grid.signed else 0
        return low, low + 2**grid.bits - 1

    def observe(self, values: Tensor, dims: tuple[int, ...], grid: Grid) -> tuple[Tensor, Tensor | None]:
        steps = 2**grid.bits - 1
        if grid.symmetric and grid.signed:
            return _stored(absolute_maximum(values, dims) / (steps / 2), grid), None
        high = values.amax(dims, keepdim=True).float().clamp_min_(0)
        if grid.symmetric:
            return _stored(high / steps, grid), None
        low = values.amin(dims, keepdim=True).float().clamp_max_(0)  # zero is always within, and exactly on the grid
        scale = _stored((high - low) / steps, grid)
        return scale, self.limits(grid)[0] - (low / scale).round_()

    def snap_(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        whole = scaled.round_() if grid.rounding == "nearest" else scaled.add_(FLOOR_TOLERANCE).floor_()
        return whole.clamp_(*self.limits(grid))

    def encode(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        whole = self.snap_(scaled, grid, codebook)
        return whole.to(torch.int16).bitwise_and_(2**grid.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        if not grid.signed:
            return codes.float()
        unused = 8 - grid.bits  # shifted out and back as signed bytes: the sign comes back by itself
        return ((codes << unused).view(torch.int8) >> unused).float()


class TernaryGrid(GridKind):
    """-1, 0 and 1 times the mean magnitude; five values a byte. Zeros do not count: pruning leaves them for a while.

    Source: Ma et al. 2024, BitNet b1.58, arXiv:2402.17764, eq. 1-3.
    """

    bits = (2,)
    ignores_zeros = False  # the last bit of a mean depends on them

    def limits(self, grid: Grid) -> tuple[float, float]:
        return -1, 1

    def observe(self, values: Tensor, dims: tuple[int, ...], grid: Grid) -> tuple[Tensor, None]:
        magnitudes = values.abs()
        counted = torch.count_nonzero(magnitudes, dims).clamp_min_(1).view_as(total := magnitudes.sum(dims, True))
        return (total.float() / counted).clamp_min_(TINY), None

    def snap_(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        return scaled.round_().clamp_(-1, 1)

    def encode(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        return self.snap_(scaled, grid, codebook).add_(1).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        return codes.float().sub_(1)

    def storage_bits(self, grid: Grid) -> float:
        return 8 / 5


class Float8Grid(GridKind):
    """8-bit floats, e4m3 without infinities. Source: Micikevicius et al. 2022, arXiv:2209.05433, table 1."""

    bits = (8,)

    def limits(self, grid: Grid) -> tuple[float, float]:
        largest = torch.finfo(torch.float8_e4m3fn).max
        return -largest, largest

    def observe(self, values: Tensor, dims: tuple[int, ...], grid: Grid) -> tuple[Tensor, None]:
        return (absolute_maximum(values, dims) / self.limits(grid)[1]).clamp_min_(TINY), None

    def snap_(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        return self._rounded(scaled, grid).float()

    def encode(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        return self._rounded(scaled, grid).view(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float()

    def _rounded(self, scaled: Tensor, grid: Grid) -> Tensor:
        return scaled.clamp_(*self.limits(grid)).to(torch.float8_e4m3fn)  # beyond its range the cast gives NaN


class TableGrid(GridKind):
    """Sixteen given values in [-1, 1], times the largest magnitude of a group; as bitsandbytes rounds and stores them.

    Args:
        values: By code.
    """

    bits = (4,)

    def __init__(self, values: tuple[float, ...]):
        self._values = torch.tensor(values)
        ascending = self._values.unique()
        self._thresholds = (ascending[1:] + ascending[:-1]) / 2  # in float32, as theirs are: ties must fall alike
        self._order = torch.tensor([self._values.tolist().index(v) for v in ascending.tolist()], dtype=torch.uint8)

    def limits(self, grid: Grid) -> tuple[float, float]:
        return -1, 1

    def observe(self, values: Tensor, dims: tuple[int, ...], grid: Grid) -> tuple[Tensor, None]:
        return absolute_maximum(values, dims).clamp_min_(TINY), None

    def encode(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        place = torch.bucketize(scaled, self._thresholds.to(scaled.device), out_int32=True)
        return self._order.to(scaled.device)[place]

    def decode(self, codes: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        return self._values.to(codes.device)[codes.int()]


class LearnedCodebook(GridKind):
    """Values that are trained with the weights, for the whole tensor or for blocks of output channels.

    Source: Han et al. 2016, Deep Compression, arXiv:1510.00149, sec. 3 (shared weights, and their gradient).
    """

    bits = (4, 3, 2)
    holds_zero = False
    learns_codebook = True

    def limits(self, grid: Grid) -> tuple[float, float]:
        return -1, 1

    def observe(self, values: Tensor, dims: tuple[int, ...], grid: Grid) -> tuple[Tensor, None]:
        return absolute_maximum(values, dims).clamp_min_(TINY), None

    def encode(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        thresholds = (codebook[:, 1:] + codebook[:, :-1]) / 2
        if len(codebook) == 1:
            return torch.bucketize(scaled, thresholds[0], out_int32=True).to(torch.uint8)
        blocks = scaled.reshape(len(codebook), -1)
        return torch.searchsorted(thresholds, blocks, out_int32=True).to(torch.uint8).view(scaled.shape)

    def decode(self, codes: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        if len(codebook) == 1:
            return codebook[0][codes.int()]
        return codebook.gather(1, codes.reshape(len(codebook), -1).long()).view(codes.shape)


def _stored(scale: Tensor, grid: Grid) -> Tensor:
    """The scale as its storage will hold it, positive."""
    return scale.to(grid.scale_dtype).float().clamp_min_(TINY)


GRIDS.register("int")(IntegerGrid())
GRIDS.register("ternary")(TernaryGrid())
GRIDS.register("fp8")(Float8Grid())
GRIDS.register("nf4")(TableGrid(NF4))
GRIDS.register("fp4")(TableGrid(FP4))
GRIDS.register("codebook")(LearnedCodebook())
