"""Packed layers: integer codes with their scales, holding exactly the values that training saw.

Every weight keeps its name as an int8 tensor of `(rows, n_groups, n_bytes)`, with `<name>_scale` of `(rows, n_groups)`
beside it: three dimensions under the usual name, so that loading without hf_slim fails loudly instead of reading codes
as weights. `<name>_zero_point` and `<name>_codebook` join them where the grid needs them.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.quantization.fake_quant import grouped, ungrouped
from hf_slim.quantization.grid import Grid, GridState, decoded, encoded, restored
from hf_slim.quantization.kernels import choose_kernel, quantized_input
from hf_slim.quantization.modules import embedding_arguments, from_matrix, with_class
from hf_slim.quantization.packing import every_code, look_up_bytes, pack_codes, packed_bytes, unpack_codes
from hf_slim.quantization.quantizer import InputQuantizer
from hf_slim.quantization.scheme import Scheme


class PackedLinear(nn.Linear):
    """A linear layer of codes; computed by the fastest kernel that fits, or through a float copy of this layer."""

    def __init__(
        self, in_features: int, out_features: int, bias: nn.Parameter | None, scheme: Scheme,
        device: str | torch.device | None = None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.bias, self.scheme, self.kernel_cache = bias, scheme, None
        add_storage_(self, scheme, {"weight": (out_features, in_features)}, device)

    def forward(self, input: Tensor) -> Tensor:
        return choose_kernel(self, input).run(self, input)

    def kernel(self, input: Tensor) -> str:
        """How `forward` computes for this input: the name of a kernel, or 'dequantize'."""
        return choose_kernel(self, input).name

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight in floating point: `(out_features, in_features)`."""
        return unpacked(self, "weight", self.in_features, dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}"


class PackedEmbedding(nn.Embedding):
    """An embedding of codes; rows are dequantized as they are looked up.

    Args:
        dtype: Of the rows that come out; the float dtype of the model.
    """

    def __init__(
        self, arguments: dict[str, Any], scheme: Scheme, dtype: torch.dtype, device: str | torch.device | None = None
    ):
        super().__init__(**arguments, device="meta")
        self.scheme, self.dtype = scheme, dtype
        add_storage_(self, Scheme(scheme.weights), {"weight": (self.num_embeddings, self.embedding_dim)}, device)

    def forward(self, input: Tensor) -> Tensor:
        grid, width = self.scheme.weights, self.embedding_dim
        codes = unpack_codes(self.weight[input].flatten(0, -3), grid.storage_bits, grid.group_size or width)
        state = stored_state(self, "weight", grid)
        zero_point = None if state.zero_point is None else state.zero_point[input].flatten(0, -3)
        rows = decoded(codes, grid, GridState(state.scale[input].flatten(0, -3), zero_point))
        return ungrouped(rows, width, self.dtype).view(*input.shape, width)


def packed_like(
    module: nn.Module, scheme: Scheme, shapes: dict[str, tuple[int, int]], transposed: bool, dims: tuple[int, ...]
) -> nn.Module:
    """Any other module with storage for codes in place of its weights; forward reads a float copy of this module.

    Args: see `modules.fake_quantized_like`.
    """
    layer = with_class(module, _packed_class(type(module), tuple(shapes)))
    layer.scheme, layer.transposed, layer.dims = scheme, transposed, dims
    layer.is_filled = False  # until then its weights are codes for everyone: whoever loads them looks at their shapes
    layer.dtype = next(iter(module.parameters(recurse=False))).dtype
    layer.float_shapes = {name: tuple(getattr(module, name).shape) for name in shapes}
    layer.columns = {name: columns for name, (_, columns) in shapes.items()}
    add_storage_(layer, scheme, shapes, next(module.parameters()).device)
    return layer


@cache
def _packed_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if self.scheme.activations is not None:
            inputs = (quantized_input(self, inputs[0], self.dims), *inputs[1:])
        return base.forward(self, *inputs, **kwargs)

    def float_copy(name: str) -> property:
        # found before the parameter of that name, so that whatever reads the weight, or its dtype, reads floats
        def read(self) -> Tensor:
            if not self.is_filled:
                return self._parameters[name]
            matrix = unpacked(self, name, self.columns[name], self.dtype)
            return from_matrix(matrix, self.float_shapes[name], self.transposed)

        return property(read)

    members = {"forward": forward, "kernel": lambda self, input: "dequantize"}
    return type(f"Packed{base.__name__}", (base,), members | {name: float_copy(name) for name in names})


def add_storage_(
    layer: nn.Module, scheme: Scheme, shapes: dict[str, tuple[int, int]], device: str | torch.device | None
) -> None:
    """Gives a layer empty storage that a checkpoint or `fill_storage_` will fill."""
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
    """Fills a packed layer's weight `name` with the codes of `(rows, columns)` float values, and their state."""
    grid = layer.scheme.weights
    codes = pack_codes(encoded(grouped(matrix, grid), grid, state), grid.storage_bits)
    layer._parameters[name] = nn.Parameter(codes, requires_grad=False)
    for suffix, value in (("scale", state.scale), ("zero_point", state.zero_point)):
        buffer = getattr(layer, f"{name}_{suffix}", None)
        if buffer is not None:
            setattr(layer, f"{name}_{suffix}", value.squeeze(-1).to(buffer.dtype))
    if state.codebook is not None:
        setattr(layer, f"{name}_codebook", state.codebook)


def fill_input_(layer: nn.Module, quantizer: InputQuantizer | None) -> None:
    """Takes over the static input scale of a trained layer, if its scheme has one."""
    if hasattr(layer, "input_scale"):
        state = quantizer.state()
        layer.input_scale = state.scale.view(1)
        if hasattr(layer, "input_zero_point"):
            layer.input_zero_point = state.zero_point.view(1)


def mark_filled_(model: nn.Module) -> None:
    """Lets packed layers that imitate others show floats for their weights, now that they hold values."""
    for module in model.modules():
        if hasattr(module, "is_filled"):
            module.is_filled = True


def stored_state(layer: nn.Module, name: str, grid: Grid) -> GridState:
    """The state that a packed layer stores for its weight `name`, as `grid.decoded` takes it."""
    if grid.scale is not None:
        scale = torch.tensor(grid.scale, dtype=torch.float32, device=layer._parameters[name].device)
        return GridState(scale, None if grid.zero_point is None else torch.full_like(scale, grid.zero_point))
    scale = getattr(layer, f"{name}_scale").float().unsqueeze(-1)
    zero_point = getattr(layer, f"{name}_zero_point", None)
    codebook = getattr(layer, f"{name}_codebook", None)
    return GridState(scale, None if zero_point is None else zero_point.float().unsqueeze(-1), codebook)


def unpacked(layer: nn.Module, name: str, columns: int, dtype: torch.dtype) -> Tensor:
    """The float values of a packed layer's weight `name`: `(rows, columns)`."""
    grid, packed = layer.scheme.weights, layer._parameters[name]
    state, size = stored_state(layer, name, grid), grid.group_size or columns
    if grid.storage_bits in (2, 4) and _books(state) == 1:  # from bytes to values at once
        table = grid.kind_of.decode(every_code(grid.bits, packed.device), grid, state.codebook)
        return ungrouped(restored(look_up_bytes(packed, table)[..., :size], state), columns, dtype)
    return ungrouped(decoded(unpack_codes(packed, grid.storage_bits, size), grid, state), columns, dtype)


def _books(state: GridState) -> int:
    return 1 if state.codebook is None else len(state.codebook)


def empty_packed_embedding(embedding: nn.Embedding, scheme: Scheme) -> PackedEmbedding:
    """A packed embedding of the same sizes, without values."""
    return PackedEmbedding(embedding_arguments(embedding), scheme, embedding.weight.dtype, embedding.weight.device)
