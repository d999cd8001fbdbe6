"""Observers: range estimates that initialise the scales of a weight."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_slim.core.registry import Registry
from hf_slim.quantization.grids.grid import TINY, Grid, GridState, as_stored, observed_state, snapped

Observer = Callable[[Tensor, Grid, tuple[int, ...]], GridState]
OBSERVERS: Registry[Observer] = Registry("observer")

PERCENTILE = 0.999  # quantile of the magnitudes of a slice; in small slices it is the largest value
# candidate scales, relative to the min-max scale; above 1 for grids whose scale is a mean
MSE_RATIOS = torch.linspace(0.3, 1.3, 41, dtype=torch.float32, device="cpu").tolist()


@OBSERVERS.register("minmax")
def minmax(values: Tensor, grid: Grid, dims: tuple[int, ...]) -> GridState:
    """The scale whose grid covers every value.

    Source: Jacob et al. 2018, arXiv:1712.05877, sec. 3.1.
    """
    return observed_state(values, grid, dims)


@OBSERVERS.register("percentile")
def percentile(values: Tensor, grid: Grid, dims: tuple[int, ...]) -> GridState:
    """The scale whose grid covers all but the largest thousandth of the magnitudes.

    Source: Wu et al. 2020, Integer quantization for deep learning inference, arXiv:2004.09602, sec. 3.3.
    """
    slices = values.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))
    limit = slices.abs().kthvalue(max(1, round(PERCENTILE * slices.shape[-1])), dim=-1).values
    for dim in sorted(dim % values.dim() for dim in dims):
        limit = limit.unsqueeze(dim)
    return observed_state(values.clamp(-limit, limit), grid, dims)


@OBSERVERS.register("mse")
def mse(values: Tensor, grid: Grid, dims: tuple[int, ...]) -> GridState:
    """The scale with the least squared rounding error: a search from 0.3 to 1.3 times the min-max scale of each slice.

    Source: Banner et al. 2019, arXiv:1810.05723 (clipping by mean squared error), by search instead of a distribution.
    """
    widest = observed_state(values, grid, dims)
    if grid.scale is not None or grid.kind_of.learns_codebook:  # a learned codebook is fitted after the scale
        return widest
    best, least = widest.scale, torch.full_like(widest.scale, torch.inf)
    for ratio in MSE_RATIOS:
        scale = as_stored(widest.scale * ratio, grid).clamp_min(TINY)
        moved = snapped(values, grid, GridState(scale, widest.zero_point, widest.codebook))
        error = moved.sub_(values).square_().sum(dims, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return GridState(best, widest.zero_point, widest.codebook)
