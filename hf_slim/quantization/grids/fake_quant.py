"""Fake quantization: values on the grid in the forward, and the gradients that train weights, scales and codebooks.

Everything is computed in float32, so that training, packing and loading agree bit for bit in every dtype.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_slim.core.registry import Registry
from hf_slim.quantization.grids.grid import TINY, Grid, GridState, as_stored, in_grid_units, observed_state, snapped

CHUNK = 2**16  # weights that are worked on at a time
# What a value adds to the gradient of its scale: (its place in units of the grid, where it went, not clipped) -> share
ScaleGradient = Callable[[Tensor, Tensor, Tensor], Tensor]
SCALE_GRADIENTS: Registry[ScaleGradient] = Registry("scale gradient")


@SCALE_GRADIENTS.register("lsq")
def lsq(place: Tensor, on_grid: Tensor, inside: Tensor) -> Tensor:
    """Rounding counts as well as clipping. Source: Esser et al. 2020, LSQ, arXiv:1902.08153, eq. 3."""
    return on_grid - place * inside  # products with a mask are several times faster than `torch.where`


@SCALE_GRADIENTS.register("pact")
def pact(place: Tensor, on_grid: Tensor, inside: Tensor) -> Tensor:
    """Only clipped values move the range. Source: Choi et al. 2018, PACT, arXiv:1805.06085, eq. 3."""
    return on_grid * ~inside


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """`(rows, columns)` as float32 `(rows, n_groups, group_size)`; a last group that is short gets zeros."""
    weight = weight.detach().float()
    if grid.group_size and weight.shape[1] % grid.group_size:
        weight = torch.nn.functional.pad(weight, (0, -weight.shape[1] % grid.group_size))
    return weight.reshape(len(weight), grid.groups(weight.shape[1]), grid.group_size or weight.shape[1])


def ungrouped(values: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `grouped`: `(rows, columns)` in `dtype`."""
    return values.flatten(1)[:, :columns].to(dtype)


def slice_dims(grid: Grid) -> tuple[int, ...]:
    """The dimensions of a grouped weight that share a scale."""
    return (0, 1, 2) if grid.granularity == "tensor" else (2,)


def observed_weight(weight: Tensor, grid: Grid) -> GridState:
    """The state that covers a `(rows, columns)` weight: scales of `(rows, n_groups, 1)`, or `(1, 1, 1)` per tensor."""
    return observed_state(grouped(weight, grid), grid, slice_dims(grid))


def learned_state(scale: Tensor, offset: Tensor | None, codebook: Tensor | None, grid: Grid) -> GridState:
    """Parameters as the grid will store them: a scale that training turned negative counts by its magnitude."""
    scale = as_stored(scale.detach().abs(), grid).clamp_min(TINY)
    zero_point = None if offset is None else as_stored(-offset.detach() / scale, grid)
    return GridState(scale, zero_point, None if codebook is None else codebook.detach().sort(dim=-1).values)


class _FollowScale(torch.autograd.Function):
    """Scales come from the weight itself, so that nothing is clipped: the gradient passes straight through."""

    # A function of its own rather than `w + (q - w).detach()`: no extra copies, nothing saved for backward.
    @staticmethod
    def forward(ctx, weight: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
        if grid.kind_of.in_place:
            values = grouped(weight, grid)
            state = observed_state(values, grid, slice_dims(grid))
            return ungrouped(snapped(values, grid, state), weight.shape[1], dtype)
        whole = observed_weight(weight, grid) if grid.granularity == "tensor" else None
        on_grid = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for rows in _row_chunks(weight, 1):
            values = grouped(weight[rows], grid)
            state = whole or observed_state(values, grid, slice_dims(grid))
            on_grid[rows] = ungrouped(snapped(values, grid, state), weight.shape[1], dtype)
        return on_grid

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class _StoredScale(torch.autograd.Function):
    """Scales are given, or are parameters: the gradient stops where a value was clipped."""

    @staticmethod
    def forward(  # noqa: PLR0913  autograd takes every tensor as an argument of its own
        ctx, weight: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, codebook: Tensor | None,
        grid: Grid, dtype: torch.dtype, rule: str, features: float,
    ) -> Tensor:  # fmt: skip
        state = _stored_state(scale, offset, zero_point, codebook, grid)
        ctx.save_for_backward(weight, scale, offset, zero_point, codebook)  # parameters all: no memory of its own
        ctx.grid, ctx.rule, ctx.features = grid, rule, features
        on_grid = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for rows in _row_chunks(weight, _books(codebook)):
            values = grouped(weight[rows], grid)
            part = _of_rows(state, rows, len(weight))
            on_grid[rows] = ungrouped(snapped(values, grid, part), weight.shape[1], dtype)
        return on_grid

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, offset, zero_point, codebook = ctx.saved_tensors
        grid, wanted = ctx.grid, ctx.needs_input_grad
        state = _stored_state(scale, offset, zero_point, codebook, grid)
        to_weight = torch.empty_like(weight) if wanted[0] else None
        to_scale = torch.zeros_like(scale) if wanted[1] else None
        to_offset = torch.zeros_like(scale) if wanted[2] else None
        to_codebook = torch.zeros_like(codebook) if wanted[4] else None
        for rows in _row_chunks(weight, _books(codebook)):
            part, upstream = _of_rows(state, rows, len(weight)), grouped(gradient[rows], grid)
            place = in_grid_units(grouped(weight[rows], grid), part)
            inside = place.clamp(*grid.kind_of.limits(grid)) == place
            if wanted[0]:
                to_weight[rows] = ungrouped(upstream * inside, weight.shape[1], weight.dtype)
            if wanted[4]:
                _add_codebook_gradient_(_rows(to_codebook, rows, len(weight)), upstream, place, grid, part)
            if wanted[1]:
                on_grid = grid.kind_of.snap_(place.clone(), grid, part.codebook)
                shares = SCALE_GRADIENTS[ctx.rule](place, on_grid, inside)
                _add_(to_scale, upstream * shares, rows)
            if wanted[2]:
                _add_(to_offset, upstream * ~inside, rows)
        if ctx.rule == "lsq":  # sec. 2.2; PACT scales nothing
            _divide_(to_scale, to_offset, by=math.sqrt(ctx.features * grid.kind_of.limits(grid)[1]))
        if wanted[1]:
            to_scale *= torch.where(scale < 0, -1.0, 1.0)  # a negative scale counts by its magnitude
        if wanted[4]:  # entries were sorted on the way in
            to_codebook = torch.zeros_like(codebook).scatter_(1, codebook.argsort(dim=-1), to_codebook)
        return to_weight, to_scale, to_offset, None, to_codebook, None, None, None, None


def _divide_(*gradients: Tensor | None, by: float) -> None:
    for gradient in gradients:
        if gradient is not None:
            gradient /= by


def fake_quantize_weight(  # noqa: PLR0913  what a quantizer holds, one by one: each may be a parameter
    weight: Tensor,
    grid: Grid,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    zero_point: Tensor | None = None,
    codebook: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight as the packed layer will hold it, differentiable in the weight, its scales and its codebook.

    Args:
        weight: `(rows, columns)`, any float dtype.
        scale: `(rows, n_groups, 1)` or `(1, 1, 1)`, the width of one step; None: found from the weight, and then
            no value is clipped by more than half a step and the gradient passes straight through.
        offset: Like `scale`: the value that code 0 stands for (LSQ+'s beta).
        zero_point: Like `scale`, in units of codes; not trained, and not together with `offset`.
        codebook: `(n_codebooks, 2**bits)`.
        dtype: Of the result; None: that of `weight`.
    Returns: the shape of `weight`, equal bit for bit to `decoded(encoded(...))`.
    Source: Bengio et al. 2013, arXiv:1308.3432 (straight-through); Esser et al. 2020, LSQ, arXiv:1902.08153, eq. 1-3
        and sec. 2.2 (gradient scale); Bhalgat et al. 2020, LSQ+, arXiv:2004.09576, eq. 2-6; Han et al. 2016, Deep
        Compression, arXiv:1510.00149, eq. 3 (codebook).
    """
    dtype = dtype or weight.dtype
    if not weight.numel():
        return weight.to(dtype)
    if scale is None and codebook is None:
        return _FollowScale.apply(weight, grid, dtype)
    if scale is None:
        scale = observed_weight(weight, grid).scale
    features = weight.numel() / scale.numel()
    return _StoredScale.apply(weight, scale, offset, zero_point, codebook, grid, dtype, "lsq", features)


def fake_quantize_static(
    activations: Tensor, grid: Grid, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, rule: str
) -> Tensor:
    """Activations on a grid with one scale for all tokens, differentiable in the scale.

    Args:
        activations: `(..., features)`.
        scale: `(1, 1, 1)`; `offset` and `zero_point` likewise, see `fake_quantize_weight`.
        rule: How clipping and rounding move the scale, from `SCALE_GRADIENTS`.
    """
    rows = activations.reshape(-1, activations.shape[-1])
    if not rows.numel():
        return activations
    arguments = (scale, offset, zero_point, None, grid, activations.dtype, rule, activations.shape[-1])
    values = _StoredScale.apply(rows, *arguments)
    return values.view(activations.shape)


class _FakeQuantizeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activations: Tensor, grid: Grid, dims: tuple[int, ...]) -> Tensor:
        values = activations.float()
        return snapped(values, grid, observed_state(activations, grid, dims)).to(activations.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def fake_quantize_tokens(activations: Tensor, grid: Grid, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """Activations rounded to a grid with one scale per token (all of `dims`); straight-through.

    Source: Yao et al. 2022, ZeroQuant, arXiv:2206.01861, sec. 4.1 (token-wise dynamic quantization).
    """
    return _FakeQuantizeTokens.apply(activations, grid, dims) if activations.numel() else activations


def quantize_tokens(activations: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes (int8, same shape) and scales (float32, last dimension 1), on the grid of `fake_quantize_tokens`.

    For symmetric, signed integer grids.
    """
    scale = observed_state(activations, grid).scale
    whole = grid.kind_of.snap_(activations.float() * scale.reciprocal(), grid, None)
    return whole.to(torch.int8), scale


def _stored_state(
    scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, codebook: Tensor | None, grid: Grid
) -> GridState:
    state = learned_state(scale, offset, codebook, grid)
    return state if zero_point is None else GridState(state.scale, zero_point, state.codebook)


def _row_chunks(weight: Tensor, books: int) -> list[slice]:
    """Slices of rows whose temporaries stay in the processor's cache, whole codebooks together; all rows on a GPU."""
    rows, columns = weight.shape
    step = max(1, CHUNK // max(columns, 1)) if weight.device.type == "cpu" else rows
    if books > 1:
        per_book = rows // books
        step = max(per_book, step // per_book * per_book)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _books(codebook: Tensor | None) -> int:
    return 1 if codebook is None else len(codebook)


def _rows(values: Tensor | None, rows: slice, n_rows: int) -> Tensor | None:
    """The part of per-row values (or of one for several rows, as codebooks are) that belongs to `rows`."""
    if values is None or len(values) == 1:
        return values
    share = n_rows // len(values)
    return values[rows.start // share : -(-rows.stop // share)]


def _of_rows(state: GridState, rows: slice, n_rows: int) -> GridState:
    parts = (_rows(value, rows, n_rows) for value in (state.scale, state.zero_point, state.codebook))
    return GridState(*parts)


def _add_(total: Tensor, gradient: Tensor, rows: slice) -> None:
    """Adds the gradient of a broadcast: summed over the values that share a scale."""
    if len(total) == 1 and total.numel() == 1:
        total += gradient.sum()
    else:
        (total[rows] if len(total) > 1 else total).add_(gradient.sum(-1, keepdim=True))


def _add_codebook_gradient_(total: Tensor, gradient: Tensor, place: Tensor, grid: Grid, state: GridState) -> None:
    """Deep Compression, eq. 3: the sum over the values that use an entry, each times its scale."""
    codes = grid.kind_of.encode(place, grid, state.codebook).reshape(len(total), -1).long()
    total.scatter_add_(1, codes, (gradient * state.scale).reshape(len(total), -1))
