"""Kernels of packed linear layers: fast ones for some devices, dtypes and shapes, and a float copy for all others.

Each kernel agrees with the dequantized layer within the rounding that its docstring states.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_slim.core.host import parameter_or_none
from hf_slim.quantization.grids.fake_quant import fake_quantize_static, fake_quantize_tokens, quantize_tokens
from hf_slim.quantization.grids.grid import GridState, encoded, observed_state
from hf_slim.quantization.grids.integer_product import (
    codes_following,
    codes_on_scale,
    integer_linear,
    is_integer_product,
    is_plain,
)
from hf_slim.quantization.grids.packing import unpack_codes
from hf_slim.quantization.storage import StoredLinear

INT4_GROUPS = (32, 64, 128, 256)  # group sizes that torch's int4 kernel supports
INT8_BLOCK = 16  # codes that torch's int8 kernel reads at once: it needs multiples of it as row length and address
# without AVX-512 torch's integer products are not vectorised
HAS_FAST_INTEGERS = torch.backends.cpu.get_cpu_capability() == "AVX512"
FEW_TOKENS = 8  # above this a float copy of the weights, made once per call, is faster than kernels made for decoding


@dataclass(frozen=True)
class Kernel:
    """A way to compute a packed linear layer.

    Attributes:
        fits: Whether it supports this layer and this input.
        run: `(layer, input (..., in_features)) -> (..., out_features)` in the dtype of the input.
    """

    name: str
    fits: Callable[[StoredLinear, Tensor], bool]
    run: Callable[[StoredLinear, Tensor], Tensor]


KERNELS: list[Kernel] = []  # in the order of preference


def choose_kernel(layer: StoredLinear, input: Tensor) -> Kernel:
    """The first kernel that supports this layer and this input."""
    for kernel in KERNELS:  # a plain loop, which torch.compile can trace
        if kernel.fits(layer, input):
            return kernel
    raise AssertionError("the float copy fits every layer")


def quantized_input(layer: torch.nn.Module, input: Tensor, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """The input rounded to its grid, in its own dtype."""
    grid = layer.scheme.activations
    if grid.granularity == "token" or grid.scale is not None:
        return fake_quantize_tokens(input, grid, dims)
    state = _input_state(layer)
    return fake_quantize_static(input, grid, state.scale, None, state.zero_point, "lsq")


def _int8_fits(layer: StoredLinear, input: Tensor) -> bool:
    if not is_integer_product(layer.scheme.weights, layer.scheme.activations):
        return False
    # integer matrix products have no gradient
    return _is_fast_cpu(input) and not _needs_gradient(input) and bool(layer.weight.numel())


def _int8_run(layer: StoredLinear, input: Tensor) -> Tensor:
    """Products of integer codes with exact integer sums, scaled once at the end; the result has float32 rounding."""
    rows = input.reshape(-1, input.shape[-1])
    grid = layer.scheme.activations
    if grid.granularity == "token":
        codes, scale = quantize_tokens(rows, grid)
    else:
        scale = _input_state(layer).scale.view(1, 1)
        codes = encoded(rows.float(), grid, GridState(scale)).view(torch.int8)
    product = torch.mul(torch._int_mm(codes, _signed_codes(layer).t()), scale)
    product.mul_(layer.weight_scale.view(1, -1))
    if layer.bias is not None:
        product.add_(layer.bias)
    return product.to(input.dtype).view(*input.shape[:-1], layer.out_features)


def _int4_fits(layer: StoredLinear, input: Tensor) -> bool:
    grid = layer.scheme.weights
    fitting = is_plain(grid) and grid.bits == 4 and grid.group_size in INT4_GROUPS
    if not fitting or layer.scheme.activations or layer.out_features % 16 or layer.in_features % grid.group_size:
        return False
    return _is_decoding_in_bfloat16(layer, input)


def _int4_run(layer: StoredLinear, input: Tensor) -> Tensor:
    """Torch's int4 kernel: bfloat16 activations and scales (as scales of groups are stored), float32 sums."""
    if layer.kernel_cache is None:
        _arrange_for_int4_(layer)
    rows, (codes, scales) = input.reshape(-1, input.shape[-1]), layer.kernel_cache
    group_size = layer.scheme.weights.group_size
    return _with_bias(torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, group_size, scales), layer, input)


@torch.compiler.disable
def _arrange_for_int4_(layer: StoredLinear) -> None:
    """Caches a copy of codes and scales in the memory layout of the kernel, at the first call."""
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_signed_codes(layer).contiguous().int() + 8, 1)
    scales = layer.weight_scale.t().unsqueeze(-1).bfloat16()
    layer.kernel_cache = codes, torch.cat((scales, torch.zeros_like(scales)), dim=-1).contiguous()


def _int8_weights_fits(layer: StoredLinear, input: Tensor) -> bool:
    grid = layer.scheme.weights
    if layer.scheme.activations or not is_plain(grid) or grid.bits != 8 or grid.granularity != "channel":
        return False
    if layer.in_features % INT8_BLOCK:
        return False
    return _is_decoding_in_bfloat16(layer, input)


def _int8_weights_run(layer: StoredLinear, input: Tensor) -> Tensor:
    """Torch's int8 weight-only kernel: bfloat16 activations and scales, float32 sums."""
    if layer.kernel_cache is None:
        _arrange_for_int8_weights_(layer)
    rows, (codes, scales) = input.reshape(-1, input.shape[-1]), layer.kernel_cache
    return _with_bias(torch.ops.aten._weight_int8pack_mm(rows, codes, scales), layer, input)


@torch.compiler.disable
def _arrange_for_int8_weights_(layer: StoredLinear) -> None:
    codes = layer.weight.squeeze(1)
    if codes.data_ptr() % INT8_BLOCK:  # codes in a memory-mapped file need not be aligned
        codes = codes.clone()
    layer.kernel_cache = codes, layer.weight_scale.view(-1).bfloat16()  # aligned codes are not copied


def _dequantize_run(layer: StoredLinear, input: Tensor) -> Tensor:
    """The reference: computes with a temporary float copy of this layer's weight."""
    if is_integer_product(layer.scheme.weights, layer.scheme.activations) and input.dtype == torch.float32:
        return _integer_product_run(layer, input)
    if layer.scheme.activations is not None:
        input = quantized_input(layer, input)
    return F.linear(input, layer.dequantized(input.dtype), layer.bias)


def _integer_product_run(layer: StoredLinear, input: Tensor) -> Tensor:
    """What the int8 kernel computes, with codes in float32: the same bits, on every device, and with a gradient."""
    rows, grid = input.reshape(-1, layer.in_features), layer.scheme.activations
    if grid.granularity == "token":
        scale = observed_state(rows.detach(), grid).scale
        codes = codes_following(rows, grid, scale)
    else:
        scale = _input_state(layer).scale
        codes, scale = codes_on_scale(rows, grid, scale, "lsq", layer.in_features), scale.view(1, 1)
    weight_scale = layer.weight_scale.view(-1, 1)
    product = integer_linear(codes, scale, _signed_codes(layer).float(), weight_scale, layer.bias)
    return product.view(*input.shape[:-1], layer.out_features)


KERNELS.append(Kernel("int8", _int8_fits, _int8_run))
KERNELS.append(Kernel("int4", _int4_fits, _int4_run))
KERNELS.append(Kernel("int8 weights", _int8_weights_fits, _int8_weights_run))
KERNELS.append(Kernel("dequantize", lambda layer, input: True, _dequantize_run))


def _is_fast_cpu(input: Tensor) -> bool:
    return input.device.type == "cpu" and HAS_FAST_INTEGERS


def _needs_gradient(input: Tensor) -> bool:
    return torch.is_grad_enabled() and input.requires_grad


def _is_decoding_in_bfloat16(layer: StoredLinear, input: Tensor) -> bool:
    few = input.numel() <= FEW_TOKENS * layer.in_features
    return few and input.dtype == torch.bfloat16 and _is_fast_cpu(input) and not _needs_gradient(input)


def _signed_codes(layer: StoredLinear) -> Tensor:
    """Codes of a signed integer grid as int8: `(out_features, in_features)`."""
    grid = layer.scheme.weights
    if grid.bits == 8:
        return layer.weight.flatten(1)
    unused = 8 - grid.bits
    codes = unpack_codes(layer.weight, grid.bits, grid.group_size or layer.in_features).flatten(1)
    return (codes[:, : layer.in_features] << unused).view(torch.int8) >> unused


def _input_state(layer: torch.nn.Module) -> GridState:
    zero_point = parameter_or_none(layer, "input_zero_point")
    return GridState(layer.input_scale.view(1, 1, 1), None if zero_point is None else zero_point.view(1, 1, 1))


def _with_bias(product: Tensor, layer: StoredLinear, input: Tensor) -> Tensor:
    if layer.bias is not None:
        product = product + layer.bias
    return product.view(*input.shape[:-1], layer.out_features)
