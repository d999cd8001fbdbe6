"""Grids: scales, codes, and the straight-through forward that trains on them.

Everything is computed in float32, so that training, packing and loading agree bit for bit in every dtype.
"""

import torch
from torch import Tensor

from hf_slim.quantization.config import Scheme


def half_range(bits: int) -> float:
    """Half of the distance between the ends of the integer grid: 127.5 for 8 bits, as compressed-tensors has it."""
    return (2**bits - 1) / 2


def absmax_scale(values: Tensor, bits: int) -> Tensor:
    """Width of one grid step for each slice along the last dimension, float32, positive.

    A slice of zeros gets the smallest normal number, so that its codes are zeros and not NaN.
    """
    # two reductions without a temporary copy: on CPU many times faster than `vector_norm` or `aminmax`
    absmax = torch.maximum(values.amax(-1, keepdim=True), values.amin(-1, keepdim=True).neg()).float()
    return (absmax / half_range(bits)).clamp_min_(torch.finfo(torch.float32).tiny)


def to_grid(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`values / scale` rounded to the nearest grid point, half to even; float32 holding whole numbers."""
    limit = 2 ** (bits - 1)
    return torch.div(values, scale).round_().clamp_(-limit, limit - 1)


def quantize_weight(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Integer codes and scales of a weight.

    Args:
        weight: `(out_features, in_features)`, any float dtype.
        scheme: Gives bits and group size.
    Returns: codes `(out_features, n_groups, group_size)` as int8, scales `(out_features, n_groups)` as float32.
    """
    grouped = _grouped(weight, scheme)
    scale = absmax_scale(grouped, scheme.weight_bits)
    return to_grid(grouped, scale, scheme.weight_bits).to(torch.int8), scale.squeeze(-1)


def dequantize_weight(codes: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weight that codes `(out, n_groups, group_size)` and scales `(out, n_groups)` stand for: `(out, in)`."""
    return (codes.float() * scale.unsqueeze(-1)).flatten(1)[:, :in_features].to(dtype)


class _FakeQuantizeWeight(torch.autograd.Function):
    # A function of its own rather than `w + (q - w).detach()`: no extra copies, nothing saved for backward.
    @staticmethod
    def forward(ctx, weight: Tensor, scheme: Scheme) -> Tensor:
        grouped = _grouped(weight, scheme)
        scale = absmax_scale(grouped, scheme.weight_bits)
        return _ungrouped(to_grid(grouped, scale, scheme.weight_bits).mul_(scale), weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _FakeQuantizeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activations: Tensor, bits: int) -> Tensor:
        scale = absmax_scale(activations, bits)
        return to_grid(activations.float(), scale, bits).mul_(scale).to(activations.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def fake_quantize_weight(weight: Tensor, scheme: Scheme, kept_columns: Tensor | None = None) -> Tensor:
    """The weight as the packed layer will hold it; the gradient passes straight through.

    No value is clipped by more than half a step, since the scale follows the largest one.

    Args:
        weight: `(out_features, in_features)`, any float dtype.
        scheme: Gives bits and group size.
        kept_columns: Indices of the columns that pruning will leave; groups are formed among these, as they will be in
            the smaller layer. Other columns come out as zeros. None: all.
    Returns: same shape and dtype, equal bit for bit to `dequantize_weight(*quantize_weight(weight, scheme))`.
    Source: Bengio et al. 2013, arXiv:1308.3432 (straight-through); Jacob et al. 2018, arXiv:1712.05877, sec. 3.
    """
    if kept_columns is None or scheme.group_size is None:  # a scale per channel does not see zero columns
        return _FakeQuantizeWeight.apply(weight, scheme)
    kept = _FakeQuantizeWeight.apply(weight.index_select(1, kept_columns), scheme)
    return torch.zeros_like(weight).index_copy(1, kept_columns, kept)


def fake_quantize_tokens(activations: Tensor, bits: int) -> Tensor:
    """Activations rounded to a symmetric grid with one scale per token (the last dimension); straight-through.

    Source: Yao et al. 2022, ZeroQuant, arXiv:2206.01861, sec. 4.1 (token-wise dynamic quantization).
    """
    return _FakeQuantizeTokens.apply(activations, bits)


def quantize_tokens(activations: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Codes (int8, same shape) and scales (float32, last dimension 1), on the grid of `fake_quantize_tokens`."""
    scale = absmax_scale(activations, bits)
    return to_grid(activations.float(), scale, bits).to(torch.int8), scale


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """`(out, in)` as float32 `(out, n_groups, group_size)`; a last group that pruning left short gets zeros."""
    weight = weight.detach().float()
    if scheme.group_size and weight.shape[1] % scheme.group_size:
        weight = torch.nn.functional.pad(weight, (0, -weight.shape[1] % scheme.group_size))
    return weight.reshape(len(weight), scheme.groups(weight.shape[1]), -1)


def _ungrouped(grouped: Tensor, like: Tensor) -> Tensor:
    return grouped.flatten(1)[:, : like.shape[1]].to(like.dtype)
