"""Products of integer codes: what a linear layer with integer weights and activations computes, trained and packed.

The layer multiplies codes and scales the sums once. A float32 product of codes is exact while its sums are below
2**24, so that training, the float copy of a packed layer and the integer kernel give the same bits. Products of values
on the grid would differ in their last bits, and each difference can move a later activation to another code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_slim.quantization.grids.fake_quant import StoredScale, grouped, learned_state
from hf_slim.quantization.grids.grid import Grid, GridState, snapped_in_units


def is_integer_product(weights: Grid, activations: Grid | None) -> bool:
    """Whether a linear layer with these grids is computed as a product of signed codes, with one scale per channel."""
    return activations is not None and not weights.group_size and is_plain(weights) and is_plain(activations)


def is_plain(grid: Grid) -> bool:
    """Whether the grid has signed integer codes with zero point 0 and scales that are found from the data."""
    return grid.kind == "int" and grid.symmetric and grid.signed and grid.scale is None


def codes_following(values: Tensor, grid: Grid, scale: Tensor) -> Tensor:
    """Codes of values whose scale was found from them: nothing is clipped, the gradient passes straight through.

    Args:
        values: `(rows, columns)`, float32.
        scale: `(rows, 1)` or `(1, 1)`.
    Returns: whole numbers in float32. The gradient that arrives must be that of the values, as `integer_linear` gives.
    """
    return _FollowingCodes.apply(values, grid, scale)


def codes_on_scale(values: Tensor, grid: Grid, scale: Tensor, rule: str, features: float) -> Tensor:
    """Codes of values on a given scale, differentiable in the scale as `fake_quantize_weight` is.

    Args:
        values: `(rows, columns)`, float32.
        scale: `(rows, 1, 1)` or `(1, 1, 1)`; may be a parameter.
        rule: How clipping and rounding move the scale, from `SCALE_GRADIENTS`.
        features: Values that share a scale.
    """
    return _CodesOnScale.apply(values, scale, None, None, None, grid, values.dtype, rule, features)


class _FollowingCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, grid: Grid, scale: Tensor) -> Tensor:
        return snapped_in_units(values.float(), grid, GridState(scale))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class _CodesOnScale(StoredScale):
    """The same gradients as for values on the grid; only what comes out is in units of the grid."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        values, scale, _, _, _, grid, _, rule, features = arguments
        ctx.save_for_backward(*arguments[:5])
        ctx.grid, ctx.rule, ctx.features = grid, rule, features
        state = learned_state(scale, None, None, grid)
        return snapped_in_units(grouped(values, grid), grid, state).flatten(1)


def integer_linear(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of codes, differentiable as the same layer of the values that the codes stand for.

    Args:
        codes: `(tokens, in_features)`, whole numbers in float32.
        scale: `(tokens, 1)` or `(1, 1)`.
        weight: `(out_features, in_features)`, whole numbers in float32.
        weight_scale: `(out_features, 1)` or `(1, 1)`.
        bias: `(out_features,)`, or None.
    Returns: `(tokens, out_features)`. In the backward pass `codes` and `weight` receive the gradients of the values.
    """
    return _IntegerLinear.apply(codes, scale, weight, weight_scale.view(1, -1), bias)


class _IntegerLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(codes, scale, weight, weight_scale)
        product = F.linear(codes, weight).mul_(scale).mul_(weight_scale)  # in the order of the integer kernel
        return product if bias is None else product.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, weight, weight_scale = ctx.saved_tensors
        wanted, scaled = ctx.needs_input_grad, None
        to_codes = to_weight = None
        if len(weight) < weight.shape[1]:  # scales are multiplied into the smaller factors
            if wanted[0]:
                scaled = gradient * weight_scale
                to_codes = scaled @ weight
            if wanted[2]:
                to_weight = torch.mul(gradient, scale, out=scaled).t() @ codes
        else:
            to_codes = gradient @ (weight * weight_scale.t()) if wanted[0] else None
            to_weight = gradient.t() @ (codes * scale) if wanted[2] else None
        return to_codes, None, to_weight, None, gradient.sum(0) if wanted[4] else None
