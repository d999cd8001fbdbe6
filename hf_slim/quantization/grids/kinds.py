"""The families of grids: integers, ternary, 8-bit floats, and fixed or learned codebooks."""

import torch
from torch import Tensor

from hf_slim.quantization.grids.grid import GRIDS, TINY, Grid, GridKind, as_stored

# For a value on the grid, float rounding can make `x * Q + B` slightly smaller than the code (by at most 2**-15 for
# codes below 256). `floor` would then return the next lower code, and quantizing twice would differ from once.
FLOOR_TOLERANCE = 2**-12
CELLS = 1024  # cells of the table that finds the nearest entry of a codebook

# Dettmers et al. 2023, QLoRA, arXiv:2305.14314, appendix E; the same numbers as in bitsandbytes.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' 4-bit floats by code: a sign bit, two exponent bits, one of mantissa; scaled into [-1, 1]
_FP4_POSITIVE = tuple(value / 12 for value in (0, 2**-4, 8, 12, 4, 6, 2, 3))
FP4 = (*_FP4_POSITIVE, *(-value for value in _FP4_POSITIVE))


def absolute_maximum(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The largest magnitude along `dims`, float32, with size 1 in these dimensions."""
    # two reductions without a temporary copy: on CPU many times faster than `vector_norm` or `aminmax`
    return torch.maximum(values.amax(dims, keepdim=True), values.amin(dims, keepdim=True).neg()).float()


class IntegerGrid(GridKind):
    """Evenly spaced integers; a symmetric 8-bit scale is the largest magnitude / 127.5, as in compressed-tensors.

    Source: Jacob et al. 2018, arXiv:1712.05877, eq. 1 and sec. 3.
    """

    in_place = True

    def limits(self, grid: Grid) -> tuple[float, float]:
        """Smallest and largest value of the grid, in units of the scale."""
        low = -(2 ** (grid.bits - 1)) if grid.signed else 0
        return low, low + 2**grid.bits - 1

    def observe(self, values: Tensor, dims: tuple[int, ...], grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (None: 0) with which the grid covers `values`."""
        steps = 2**grid.bits - 1
        if grid.symmetric and grid.signed:
            return _stored(absolute_maximum(values, dims) / (steps / 2), grid), None
        high = values.amax(dims, keepdim=True).float().clamp_min_(0)
        if grid.symmetric:
            return _stored(high / steps, grid), None
        low = values.amin(dims, keepdim=True).float().clamp_max_(0)  # the range includes zero, which is on the grid
        scale = _stored((high - low) / steps, grid)
        return scale, self.limits(grid)[0] - (low / scale).round_()

    def snap_(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The nearest grid value of each value in `scaled`; may reuse the memory of `scaled`."""
        whole = scaled.round_() if grid.rounding == "nearest" else scaled.add_(FLOOR_TOLERANCE).floor_()
        return whole.clamp_(*self.limits(grid))

    def encode(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The code of the nearest value of the grid, uint8."""
        whole = self.snap_(scaled, grid, codebook)
        return whole.to(torch.int16).bitwise_and_(2**grid.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The value of every code, in units of the scale, float32."""
        if not grid.signed:
            return codes.float()
        unused = 8 - grid.bits  # shifting left and right again as signed bytes extends the sign
        return ((codes << unused).view(torch.int8) >> unused).float()


class TernaryGrid(GridKind):
    """The values -1, 0 and 1 times the mean magnitude of the non-zero weights; five values are stored in one byte.

    Source: Ma et al. 2024, BitNet b1.58, arXiv:2402.17764, eq. 1-3.
    """

    bits = (2,)
    in_place = True
    ignores_zeros = False  # zeros can change the last bit of the mean

    def limits(self, grid: Grid) -> tuple[float, float]:
        """Smallest and largest value of the grid, in units of the scale."""
        return -1, 1

    def observe(self, values: Tensor, dims: tuple[int, ...], grid: Grid) -> tuple[Tensor, None]:
        """Scale and zero point (None: 0) with which the grid covers `values`."""
        magnitudes = values.abs()
        counted = torch.count_nonzero(magnitudes, dims).clamp_min_(1).view_as(total := magnitudes.sum(dims, True))
        return (total.float() / counted).clamp_min_(TINY), None

    def snap_(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The nearest grid value of each value in `scaled`; may reuse the memory of `scaled`."""
        return scaled.round_().clamp_(-1, 1)

    def encode(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The code of the nearest value of the grid, uint8."""
        return self.snap_(scaled, grid, codebook).add_(1).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The value of every code, in units of the scale, float32."""
        return codes.float().sub_(1)

    def storage_bits(self, grid: Grid) -> float:
        """Bits of one stored code: five ternary values are stored in one byte."""
        return 8 / 5


class Float8Grid(GridKind):
    """8-bit floating point, e4m3 without infinities. Source: Micikevicius et al. 2022, arXiv:2209.05433, table 1."""

    bits = (8,)

    def limits(self, grid: Grid) -> tuple[float, float]:
        """Smallest and largest value of the grid, in units of the scale."""
        largest = torch.finfo(torch.float8_e4m3fn).max
        return -largest, largest

    def observe(self, values: Tensor, dims: tuple[int, ...], grid: Grid) -> tuple[Tensor, None]:
        """Scale and zero point (None: 0) with which the grid covers `values`."""
        return (absolute_maximum(values, dims) / self.limits(grid)[1]).clamp_min_(TINY), None

    def snap_(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The nearest grid value of each value in `scaled`; may reuse the memory of `scaled`."""
        return self._rounded(scaled, grid).float()

    def encode(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The code of the nearest value of the grid, uint8."""
        return self._rounded(scaled, grid).view(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The value of every code, in units of the scale, float32."""
        return codes.view(torch.float8_e4m3fn).float()

    def _rounded(self, scaled: Tensor, grid: Grid) -> Tensor:
        return scaled.clamp_(*self.limits(grid)).to(torch.float8_e4m3fn)  # beyond its range the cast gives NaN


class _CodebookGrid(GridKind):
    """Codebook entries times the largest magnitude of a slice; a value is rounded to the nearest entry."""

    def limits(self, grid: Grid) -> tuple[float, float]:
        return -1, 1

    def observe(self, values: Tensor, dims: tuple[int, ...], grid: Grid) -> tuple[Tensor, None]:
        return absolute_maximum(values, dims).clamp_min_(TINY), None


class TableGrid(_CodebookGrid):
    """Sixteen fixed values times the largest magnitude of a group, rounded and stored as bitsandbytes does.

    Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, appendix E; FP4 as in bitsandbytes.

    Args:
        values: The value of each code, in the order of the codes.
    """

    bits = (4,)

    def __init__(self, values: tuple[float, ...]):
        # explicit device and dtype: other defaults may be set while this file is imported, as during loading
        self._values = torch.tensor(values, dtype=torch.float32, device="cpu")
        self._ascending = self._values.unique().unsqueeze(0)
        order = [self._values.tolist().index(value) for value in self._ascending[0].tolist()]
        self._order = torch.tensor(order, dtype=torch.uint8, device="cpu")

    def snap_(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The nearest grid value of each value in `scaled`; may reuse the memory of `scaled`."""
        ascending = self._ascending.to(scaled.device)
        return ascending[0].index_select(0, nearest_entries(scaled, ascending).view(-1)).view(scaled.shape)

    def encode(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The code of the nearest value of the grid, uint8."""
        indices = nearest_entries(scaled, self._ascending.to(scaled.device))
        return self._order.to(scaled.device).index_select(0, indices.view(-1)).view(scaled.shape)

    def decode(self, codes: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The value of every code, in units of the scale, float32."""
        return self._values.to(codes.device).index_select(0, codes.int().view(-1)).view(codes.shape)


class LearnedCodebook(_CodebookGrid):
    """4, 8 or 16 values that are trained with the weights, for the whole tensor or for blocks of output channels.

    Source: Han et al. 2016, Deep Compression, arXiv:1510.00149, sec. 3 (shared weights, and their gradient).
    """

    bits = (4, 3, 2)
    holds_zero = False
    learns_codebook = True

    def encode(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The code of the nearest value of the grid, uint8."""
        return nearest_entries(scaled, codebook).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The value of every code, in units of the scale, float32."""
        return self._looked_up(codes.int(), codebook)

    def snap_(self, scaled: Tensor, grid: Grid, codebook: Tensor | None) -> Tensor:
        """The nearest grid value of each value in `scaled`; may reuse the memory of `scaled`."""
        return self._looked_up(nearest_entries(scaled, codebook), codebook)

    def _looked_up(self, indices: Tensor, codebook: Tensor) -> Tensor:
        books, entries = codebook.shape
        flat = indices.reshape(books, -1)
        if books > 1:
            flat = flat + torch.arange(0, books * entries, entries, dtype=flat.dtype, device=flat.device).unsqueeze(1)
        return codebook.view(-1).index_select(0, flat.view(-1)).view(indices.shape)


def nearest_entries(scaled: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest entry for each value; for a value half-way between two entries, the lower one.

    Four times as fast on CPU as `torch.bucketize`: [-1, 1] is divided into equal cells, a table gives the number of
    thresholds in lower cells, and comparisons count the thresholds within the cell of the value.

    Args:
        scaled: float32; its rows are split into consecutive blocks of equal size, one for each codebook.
        codebook: `(n_codebooks, entries)`, ascending.
    Returns: int32, the shape of `scaled`.
    """
    scaled = scaled.contiguous()
    books, entries = codebook.shape
    thresholds = (codebook[:, 1:] + codebook[:, :-1]) / 2
    if torch.compiler.is_compiling():  # torch.compile cannot trace a loop whose length is a tensor's value
        return torch.searchsorted(thresholds, scaled.reshape(books, -1), out_int32=True).view(scaled.shape)
    edges = _cells(thresholds)
    every_cell = torch.arange(CELLS + 1, dtype=torch.int32, device=scaled.device).expand(books, -1).contiguous()
    table = torch.searchsorted(edges, every_cell, out_int32=True).view(-1)
    most_in_a_cell = int((edges.unsqueeze(-1) == edges.unsqueeze(-2)).sum(-1).max()) if entries > 1 else 0
    thresholds = torch.cat((thresholds, thresholds.new_full((books, 1), torch.inf)), dim=1).view(-1)
    cells = _cells(scaled).view(books, -1)
    block = torch.arange(books, dtype=torch.int32, device=scaled.device).unsqueeze(1)
    indices = table.index_select(0, (cells + block * (CELLS + 1) if books > 1 else cells).view(-1)).view(cells.shape)
    flat = scaled.reshape(books, -1)
    for _ in range(most_in_a_cell):
        here = indices + block * entries if books > 1 else indices
        indices = indices + (flat > thresholds.index_select(0, here.view(-1)).view(flat.shape))
    return indices.view(scaled.shape)


def _cells(values: Tensor) -> Tensor:
    """Index of the cell that contains a value, of `CELLS` + 1 equal cells of [-1, 1]; increases with the value."""
    return values.clamp(-1, 1).nan_to_num_(0).add_(1).mul_(CELLS / 2).int()


def _stored(scale: Tensor, grid: Grid) -> Tensor:
    """The scale rounded to the dtype of its storage, positive."""
    return as_stored(scale, grid).clamp_min(TINY)


GRIDS.register("int")(IntegerGrid())
GRIDS.register("ternary")(TernaryGrid())
GRIDS.register("fp8")(Float8Grid())
GRIDS.register("nf4")(TableGrid(NF4))
GRIDS.register("fp4")(TableGrid(FP4))
GRIDS.register("codebook")(LearnedCodebook())
