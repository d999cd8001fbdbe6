"""Packed layers: integer codes with scales, which stand for exactly the values that training used.

Every weight keeps its name as an int8 tensor of `(rows, n_groups, n_bytes)`; its scales are `<name>_scale`, of shape
`(rows, n_groups)`. The codes have three dimensions, so that loading without hf_slim raises an error instead of using
codes as weights. `<name>_zero_point` and `<name>_codebook` are stored as well if the grid has them.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.contracts import PackedLayer
from hf_slim.core.host import parameter_or_none
from hf_slim.quantization.grids.fake_quant import ungrouped
from hf_slim.quantization.grids.grid import GridState, decoded
from hf_slim.quantization.grids.packing import unpack_codes
from hf_slim.quantization.kernels.cpu import choose_kernel, quantized_input
from hf_slim.quantization.layers.scale_holders import InputQuantizer
from hf_slim.quantization.layers.training import embedding_arguments, from_matrix, with_class
from hf_slim.quantization.scheme import Scheme
from hf_slim.quantization.storage import add_storage_, stored_state, unpacked


class PackedLinear(nn.Linear, PackedLayer):
    """A linear layer with a packed weight, computed by the first kernel that supports it, or from a float copy."""

    def __init__(
        self, in_features: int, out_features: int, bias: nn.Parameter | None, scheme: Scheme,
        device: str | torch.device | None = None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.bias, self.scheme, self.kernel_cache = bias, scheme, None
        add_storage_(self, scheme, {"weight": (out_features, in_features)}, device)

    def forward(self, input: Tensor) -> Tensor:
        """The output of the layer, computed from codes."""
        return choose_kernel(self, input).run(self, input)

    def kernel(self, input: Tensor) -> str:
        """The name of the kernel that `forward` uses for this input; 'dequantize' is the float copy."""
        return choose_kernel(self, input).name

    def float_shape(self, name: str) -> tuple[int, ...]:
        """`(out_features, in_features)`."""
        return self.out_features, self.in_features

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight in floating point: `(out_features, in_features)`."""
        return unpacked(self, "weight", self.in_features, dtype)

    def extra_repr(self) -> str:
        """The scheme, for `print(model)`."""
        return f"{super().extra_repr()}, scheme={self.scheme}"


class PackedEmbedding(nn.Embedding, PackedLayer):
    """An embedding with a packed weight; rows are dequantized when they are looked up.

    Args:
        dtype: Dtype of the returned rows; the float dtype of the model.
    """

    def __init__(
        self, arguments: dict[str, Any], scheme: Scheme, dtype: torch.dtype, device: str | torch.device | None = None
    ):
        super().__init__(**arguments, device="meta")
        self.scheme, self.dtype = scheme, dtype
        add_storage_(self, Scheme(scheme.weights), {"weight": (self.num_embeddings, self.embedding_dim)}, device)

    def forward(self, input: Tensor) -> Tensor:
        """The output of the layer, computed from codes."""
        grid, width = self.scheme.weights, self.embedding_dim
        codes = unpack_codes(self.weight[input].flatten(0, -3), grid.storage_bits, grid.group_size or width)
        state = stored_state(self, "weight", grid)
        zero_point = None if state.zero_point is None else state.zero_point[input].flatten(0, -3)
        rows = decoded(codes, grid, GridState(state.scale[input].flatten(0, -3), zero_point))
        return ungrouped(rows, width, self.dtype).view(*input.shape, width)

    def float_shape(self, name: str) -> tuple[int, ...]:
        """`(num_embeddings, embedding_dim)`."""
        return self.num_embeddings, self.embedding_dim

    def kernel(self, input: Tensor) -> str:
        """'lookup': rows are dequantized when they are looked up."""
        return "lookup"


def packed_like(
    module: nn.Module, scheme: Scheme, shapes: dict[str, tuple[int, int]], transposed: bool, dims: tuple[int, ...]
) -> nn.Module:
    """A copy of any other module with packed weights; its forward pass uses a float copy of each weight.

    Args: see `training.fake_quantized_like`.
    """
    layer = with_class(module, _packed_class(type(module), tuple(shapes)))
    layer.scheme, layer.transposed, layer.dims = scheme, transposed, dims
    layer.is_filled = False  # until then attribute access returns the raw codes: the loader compares their shapes
    layer.dtype = next(iter(module.parameters(recurse=False))).dtype
    layer.float_shapes = {name: tuple(module.get_parameter(name).shape) for name in shapes}
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
        # a property hides the parameter of that name, so that code that reads the weight or its dtype gets floats
        def read(self) -> Tensor:
            if not self.is_filled:
                return self._parameters[name]
            matrix = unpacked(self, name, self.columns[name], self.dtype)
            return from_matrix(matrix, self.float_shapes[name], self.transposed)

        return property(read)

    def float_shape(self, name: str) -> tuple[int, ...]:
        return self.float_shapes[name]

    def mark_filled_(self) -> None:
        self.is_filled = True

    def kernel(self, input: Tensor) -> str:
        return "dequantize"

    members = {"forward": forward, "float_shape": float_shape, "mark_filled_": mark_filled_, "kernel": kernel}
    weights = {name: float_copy(name) for name in names}
    return type(f"Packed{base.__name__}", (base, PackedLayer), members | weights)


def fill_input_(layer: nn.Module, quantizer: InputQuantizer | None) -> None:
    """Copies the static input scale of a trained layer, if its scheme has one."""
    if parameter_or_none(layer, "input_scale") is not None:
        state = quantizer.state()
        layer.input_scale = state.scale.view(1)
        if parameter_or_none(layer, "input_zero_point") is not None:
            layer.input_zero_point = state.zero_point.view(1)


def mark_filled_(model: nn.Module) -> None:
    """Marks packed layers as filled: those made by `packed_like` then return floats when a weight is read."""
    for module in model.modules():
        if isinstance(module, PackedLayer):
            module.mark_filled_()


def empty_packed_embedding(embedding: nn.Embedding, scheme: Scheme) -> PackedEmbedding:
    """A packed embedding of the same sizes, without values."""
    return PackedEmbedding(embedding_arguments(embedding), scheme, embedding.weight.dtype, embedding.weight.device)
