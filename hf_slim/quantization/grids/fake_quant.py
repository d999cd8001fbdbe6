"""Fake quantization: rounding in the forward pass, gradients of weights, scales and codebooks in the backward pass.

Everything is computed in float32, so that training, packing and loading agree bit for bit in every dtype.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_slim.core.registry import Registry
from hf_slim.quantization.grids.grid import (
    TINY,
    Grid,
    GridState,
    as_stored,
    in_grid_units,
    observed_state,
    snapped,
)

CHUNK = 2**16  # weights that are processed at a time
# (values in grid units, rounded values, mask of the values that are not clipped) -> derivative by the scale, per value
ScaleGradient = Callable[[Tensor, Tensor, Tensor], Tensor]
SCALE_GRADIENTS: Registry[ScaleGradient] = Registry("scale gradient")


@SCALE_GRADIENTS.register("lsq")
def lsq(scaled: Tensor, on_grid: Tensor, inside: Tensor) -> Tensor:
    """Rounded and clipped values contribute. Source: Esser et al. 2020, LSQ, arXiv:1902.08153, eq. 3."""
    return on_grid - scaled * inside  # products with a mask are several times faster than `torch.where`


@SCALE_GRADIENTS.register("pact")
def pact(scaled: Tensor, on_grid: Tensor, inside: Tensor) -> Tensor:
    """Only clipped values contribute. Source: Choi et al. 2018, PACT, arXiv:1805.06085, eq. 3."""
    return on_grid * ~inside


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """`(rows, columns)` as float32 `(rows, n_groups, group_size)`; a short last group is padded with zeros."""
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
    """Trained parameters in the form that is stored: a scale that became negative is replaced by its magnitude."""
    scale = as_stored(scale.detach().abs(), grid).clamp_min(TINY)
    zero_point = None if offset is None else as_stored(-offset.detach() / scale, grid)
    return GridState(scale, zero_point, None if codebook is None else codebook.detach().sort(dim=-1).values)


class _ScaleFromWeight(torch.autograd.Function):
    """Scales are computed from the weight, so that nothing is clipped and the gradient is straight-through."""

    # A separate function instead of `w + (q - w).detach()`: no extra copies, and nothing is saved for backward.
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


class StoredScale(torch.autograd.Function):
    """Scales are buffers or parameters; a clipped value gets no gradient."""

    @staticmethod
    def forward(  # noqa: PLR0913  autograd needs every tensor as a separate argument
        ctx, weight: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, codebook: Tensor | None,
        grid: Grid, dtype: torch.dtype, rule: str, features: float,
    ) -> Tensor:  # fmt: skip
        """The weight on the grid; see `fake_quantize_weight`."""
        state = _stored_state(scale, offset, zero_point, codebook, grid)
        ctx.save_for_backward(weight, scale, offset, zero_point, codebook)  # no extra memory: the layer holds them all
        ctx.grid, ctx.rule, ctx.features = grid, rule, features
        on_grid = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for rows in _row_chunks(weight, _n_codebooks(codebook)):
            values = grouped(weight[rows], grid)
            part = _of_rows(state, rows, len(weight))
            on_grid[rows] = ungrouped(snapped(values, grid, part), weight.shape[1], dtype)
        return on_grid

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the weight, its scale, its offset and its codebook."""
        weight, scale, offset, zero_point, codebook = ctx.saved_tensors
        grid, wanted = ctx.grid, ctx.needs_input_grad
        state = _stored_state(scale, offset, zero_point, codebook, grid)
        to_weight = torch.empty_like(weight) if wanted[0] else None
        to_scale = torch.zeros_like(scale) if wanted[1] else None
        to_offset = torch.zeros_like(scale) if wanted[2] else None
        to_codebook = torch.zeros_like(codebook) if wanted[4] else None
        for rows in _row_chunks(weight, _n_codebooks(codebook)):
            part, upstream = _of_rows(state, rows, len(weight)), grouped(gradient[rows], grid)
            scaled = in_grid_units(grouped(weight[rows], grid), part)
            inside = scaled.clamp(*grid.kind_of.limits(grid)) == scaled
            if wanted[0]:
                to_weight[rows] = ungrouped(upstream * inside, weight.shape[1], weight.dtype)
            if wanted[4]:
                _add_codebook_gradient_(_rows(to_codebook, rows, len(weight)), upstream, scaled, grid, part)
            if wanted[1]:
                on_grid = grid.kind_of.snap_(scaled.clone(), grid, part.codebook)
                shares = SCALE_GRADIENTS[ctx.rule](scaled, on_grid, inside)
                _add_(to_scale, upstream * shares, rows)
            if wanted[2]:
                _add_(to_offset, upstream * ~inside, rows)
        if ctx.rule == "lsq":  # gradient scale of LSQ, sec. 2.2; PACT has none
            _divide_(to_scale, to_offset, by=math.sqrt(ctx.features * grid.kind_of.limits(grid)[1]))
        if wanted[1]:
            to_scale *= torch.where(scale < 0, -1.0, 1.0)  # the forward pass uses the magnitude of a negative scale
        if wanted[4]:  # the forward pass sorted the entries
            to_codebook = torch.zeros_like(codebook).scatter_(1, codebook.argsort(dim=-1), to_codebook)
        return to_weight, to_scale, to_offset, None, to_codebook, None, None, None, None


def _divide_(*gradients: Tensor | None, by: float) -> None:
    for gradient in gradients:
        if gradient is not None:
            gradient /= by


def fake_quantize_weight(  # noqa: PLR0913  the state of a quantizer as separate arguments: each may be a parameter
    weight: Tensor,
    grid: Grid,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    zero_point: Tensor | None = None,
    codebook: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight rounded to the values of the packed layer, differentiable in the weight, its scales and its codebook.

    Args:
        weight: `(rows, columns)`, any float dtype.
        scale: `(rows, n_groups, 1)` or `(1, 1, 1)`, the width of one step. None: it is computed from the weight; then
            no value is clipped by more than half a step, and the gradient is straight-through.
        offset: Shape of `scale`; the value that code 0 stands for (LSQ+'s beta).
        zero_point: Shape of `scale`, in units of codes; not trained, and not together with `offset`.
        codebook: `(n_codebooks, 2**bits)`.
        dtype: Dtype of the result. None: the dtype of `weight`.
    Returns: the shape of `weight`, equal bit for bit to `decoded(encoded(...))`.
    Source: Bengio et al. 2013, arXiv:1308.3432 (straight-through); Esser et al. 2020, LSQ, arXiv:1902.08153, eq. 1-3
        and sec. 2.2 (gradient scale); Bhalgat et al. 2020, LSQ+, arXiv:2004.09576, eq. 2-6; Han et al. 2016, Deep
        Compression, arXiv:1510.00149, eq. 3 (codebook).
    """
    dtype = dtype or weight.dtype
    if not weight.numel():
        return weight.to(dtype)
    if scale is None and codebook is None:
        return _ScaleFromWeight.apply(weight, grid, dtype)
    if scale is None:
        scale = observed_weight(weight, grid).scale
    features = weight.numel() / scale.numel()
    return StoredScale.apply(weight, scale, offset, zero_point, codebook, grid, dtype, "lsq", features)


def fake_quantize_static(
    activations: Tensor, grid: Grid, scale: Tensor, offset: Tensor | None, zero_point: Tensor | None, rule: str
) -> Tensor:
    """Activations rounded to a grid with one scale for all tokens, differentiable in the scale.

    Args:
        activations: `(..., features)`.
        scale: `(1, 1, 1)`, as are `offset` and `zero_point`; see `fake_quantize_weight`.
        rule: Name of the gradient of the scale, in `SCALE_GRADIENTS`.
    """
    rows = activations.reshape(-1, activations.shape[-1])
    if not rows.numel():
        return activations
    arguments = (scale, offset, zero_point, None, grid, activations.dtype, rule, activations.shape[-1])
    values = StoredScale.apply(rows, *arguments)
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
    """Activations rounded to a grid with one scale per token (over all of `dims`); the gradient is straight-through.

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
    """Slices of rows whose temporaries fit into the CPU's cache; rows of one codebook are together. A GPU gets one."""
    rows, columns = weight.shape
    step = max(1, CHUNK // max(columns, 1)) if weight.device.type == "cpu" else rows
    if books > 1:
        per_book = rows // books
        step = max(per_book, step // per_book * per_book)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _n_codebooks(codebook: Tensor | None) -> int:
    return 1 if codebook is None else len(codebook)


def _rows(values: Tensor | None, rows: slice, n_rows: int) -> Tensor | None:
    """The entries of `values` that belong to `rows`. One entry covers one row, or several rows as a codebook does."""
    if values is None or len(values) == 1:
        return values
    share = n_rows // len(values)
    return values[rows.start // share : -(-rows.stop // share)]


def _of_rows(state: GridState, rows: slice, n_rows: int) -> GridState:
    parts = (_rows(value, rows, n_rows) for value in (state.scale, state.zero_point, state.codebook))
    return GridState(*parts)


def _add_(total: Tensor, gradient: Tensor, rows: slice) -> None:
    """Adds `gradient` to `total`, summed over the values that share a scale."""
    if len(total) == 1 and total.numel() == 1:
        total += gradient.sum()
    else:
        (total[rows] if len(total) > 1 else total).add_(gradient.sum(-1, keepdim=True))


def _add_codebook_gradient_(total: Tensor, gradient: Tensor, scaled: Tensor, grid: Grid, state: GridState) -> None:
    """Adds to each entry the gradients of the values that use it, times their scales (Deep Compression, eq. 3)."""
    codes = grid.kind_of.encode(scaled, grid, state.codebook).reshape(len(total), -1).long()
    total.scatter_add_(1, codes, (gradient * state.scale).reshape(len(total), -1))
