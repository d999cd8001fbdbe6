"""Storage of packed weights: codes, scales, zero points and codebooks as parameters and buffers of a module."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_slim.core.host import parameter_or_none
from hf_slim.quantization.grids.fake_quant import grouped, ungrouped
from hf_slim.quantization.grids.grid import Grid, GridState, decoded, encoded, restored
from hf_slim.quantization.grids.packing import every_code, look_up_bytes, pack_codes, packed_bytes, unpack_codes
from hf_slim.quantization.scheme import Scheme


class StoredLinear(Protocol):
    """The attributes of a packed linear layer that a kernel may read.

    Attributes:
        scheme: Grids of weight and activations.
        in_features: Columns of the weight.
        weight: Codes, int8 `(out_features, n_groups, n_bytes)`.
        bias: `(out_features,)`, or None.
        kernel_cache: Data that a kernel keeps between calls, such as a reordered copy of the weight.
    """

    scheme: Scheme
    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    kernel_cache: Any

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight in floating point: `(out_features, in_features)`."""
        ...


def add_storage_(
    layer: nn.Module, scheme: Scheme, shapes: dict[str, tuple[int, int]], device: str | torch.device | None
) -> None:
    """Adds empty storage to a layer, to be filled from a checkpoint or by `fill_storage_`."""
    grid = scheme.weights
    for name, (rows, columns) in shapes.items():
        groups = grid.groups(columns)
        n_bytes = packed_bytes(grid.group_size or columns, grid.storage_bits)
        codes = torch.empty(rows, groups, n_bytes, dtype=torch.int8, device=device)
        layer._parameters[name] = nn.Parameter(codes, requires_grad=False)
        scales = (1, 1) if grid.granularity == "tensor" else (rows, groups)
        if grid.scale is None:
            layer.register_buffer(f"{name}_scale", torch.empty(scales, dtype=grid.scale_dtype, device=device))
            if not grid.symmetric:
                zeros = torch.empty(scales, dtype=grid.scale_dtype, device=device)
                layer.register_buffer(f"{name}_zero_point", zeros)
        if grid.kind_of.learns_codebook:
            books = rows // (grid.codebook_channels or rows)
            empty = torch.empty(books, 2**grid.bits, dtype=torch.float32, device=device)
            layer.register_buffer(f"{name}_codebook", empty)
    activations = scheme.activations
    if activations is not None and activations.granularity == "tensor" and activations.scale is None:
        layer.register_buffer("input_scale", torch.empty(1, dtype=torch.float32, device=device))
        if not activations.symmetric:
            layer.register_buffer("input_zero_point", torch.empty(1, dtype=torch.float32, device=device))


def fill_storage_(layer: nn.Module, name: str, matrix: Tensor, state: GridState) -> None:
    """Stores `(rows, columns)` float values as the weight `name` of a packed layer: their codes and their state."""
    grid = layer.scheme.weights
    codes = pack_codes(encoded(grouped(matrix, grid), grid, state), grid.storage_bits)
    layer._parameters[name] = nn.Parameter(codes, requires_grad=False)
    for suffix, value in (("scale", state.scale), ("zero_point", state.zero_point)):
        buffer = parameter_or_none(layer, f"{name}_{suffix}")
        if buffer is not None:
            setattr(layer, f"{name}_{suffix}", value.squeeze(-1).to(buffer.dtype))
    if state.codebook is not None:
        setattr(layer, f"{name}_codebook", state.codebook)


def stored_state(layer: nn.Module, name: str, grid: Grid) -> GridState:
    """The state that a packed layer stores for its weight `name`, in the form that `grid.decoded` takes."""
    if grid.scale is not None:
        scale = torch.tensor(grid.scale, dtype=torch.float32, device=layer._parameters[name].device)
        return GridState(scale, None if grid.zero_point is None else torch.full_like(scale, grid.zero_point))
    scale = layer.get_buffer(f"{name}_scale").float().unsqueeze(-1)
    zero_point = parameter_or_none(layer, f"{name}_zero_point")
    codebook = parameter_or_none(layer, f"{name}_codebook")
    return GridState(scale, None if zero_point is None else zero_point.float().unsqueeze(-1), codebook)


def unpacked(layer: nn.Module, name: str, columns: int, dtype: torch.dtype) -> Tensor:
    """The float values of a packed layer's weight `name`: `(rows, columns)`."""
    grid, packed = layer.scheme.weights, layer._parameters[name]
    state, size = stored_state(layer, name, grid), grid.group_size or columns
    if grid.storage_bits in (2, 4) and _n_codebooks(state) == 1:  # looks up bytes directly, without unpacking codes
        table = grid.kind_of.decode(every_code(grid.bits, packed.device), grid, state.codebook)
        return ungrouped(restored(look_up_bytes(packed, table)[..., :size], state), columns, dtype)
    return ungrouped(decoded(unpack_codes(packed, grid.storage_bits, size), grid, state), columns, dtype)


def _n_codebooks(state: GridState) -> int:
    return 1 if state.codebook is None else len(state.codebook)
