"""Fake-quantized layers: the forward pass uses the values of the packed form; parameters remain in floating point."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_slim.core.contracts import PreparedLayer, copy_kept_columns_, kept_columns
from hf_slim.core.host import is_transposed_linear
from hf_slim.core.modules import autocast_dtype
from hf_slim.quantization.grids.integer_product import integer_linear, is_integer_product
from hf_slim.quantization.layers.scale_holders import InputQuantizer, WeightQuantizer
from hf_slim.quantization.scheme import Scheme


@dataclass(frozen=True)
class Training:
    """How quantizers initialise and train their state; see the same settings of `QuantizationConfig`."""

    learn: str | None = None
    learn_activations: str | None = None
    calibration_batches: int = 8
    stored: bool = False


def add_quantizers_(
    layer: nn.Module, scheme: Scheme, shapes: dict[str, tuple[int, int]], training: Training, dims: tuple[int, ...]
) -> None:
    """Adds to a layer one weight quantizer for each `{weight name: (rows, columns)}`, and one for its input."""
    layer.scheme = scheme
    layer.columns = {name: columns for name, (_, columns) in shapes.items()}
    for name, shape in shapes.items():
        device = layer.get_parameter(name).device
        quantizer = WeightQuantizer(scheme.weights, shape, training.learn, training.stored, device)
        layer.add_module(f"{name}_quantizer", quantizer)
    layer.input_quantizer = None
    if scheme.activations is not None:
        device = next(layer.parameters(recurse=False)).device
        layer.input_quantizer = InputQuantizer(
            scheme.activations, dims, training.learn_activations, training.calibration_batches, device
        )


def _multiplies_codes(layer: nn.Module, input: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether the packed form of a linear layer would multiply integers in float32: then this one does the same.

    Args:
        dtype: Of autocast; None: it is off.
    """
    weights, activations = layer.scheme.weights, layer.scheme.activations
    if dtype is not None or not is_integer_product(weights, activations):
        return False
    if weights.rounding == "floor" and kept_columns(layer, "weight") is not None:
        return False  # masked columns would not stay zero
    is_float32 = input.dtype == layer.weight.dtype == torch.float32 and input.numel() and layer.weight.numel()
    return bool(is_float32) and layer.weight_quantizer.enabled and layer.input_quantizer.gives_codes


def _product_of_codes(layer: nn.Module, matrix: Tensor, input: Tensor) -> Tensor:
    codes, scale = layer.input_quantizer.codes(input.reshape(-1, input.shape[-1]))
    weight, weight_scale = layer.weight_quantizer.codes(matrix)
    return integer_linear(codes, scale, weight, weight_scale, layer.bias).view(*input.shape[:-1], len(matrix))


class FakeQuantLinear(nn.Linear, PreparedLayer):
    """A linear layer with fake-quantized weight and input; `weight` is the float master.

    Attributes:
        weight_change: Returns the change that an adapter adds to `weight` when it is merged; None without an adapter.
            See `merged_adapters`.
        read_weight: Returns the float weight if `weight` is stored in another form, as by bitsandbytes; else None.
    """

    def __init__(self, linear: nn.Linear, scheme: Scheme, training: Training):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        copy_kept_columns_(linear, self)
        self.weight_change: Callable[[], Tensor | None] | None = None
        self.read_weight: Callable[[], Tensor] | None = None
        add_quantizers_(self, scheme, {"weight": (self.out_features, self.in_features)}, training, (-1,))

    def forward(self, input: Tensor) -> Tensor:
        """The output of the layer with rounded weights and, if the scheme has them, rounded inputs."""
        dtype = autocast_dtype(input.device)  # autocast would cast the weight to it in a separate pass over the weight
        if _multiplies_codes(self, input, dtype):
            return _product_of_codes(self, self.merged_weight(), input)
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        weight = self.weight_quantizer(self.merged_weight(), kept_columns(self, "weight"), dtype)
        return F.linear(input, weight, self.bias)

    def merged_weight(self) -> Tensor:
        """The weight that is rounded: the master plus the change of an adapter."""
        weight = self.weight if self.read_weight is None else self.read_weight()
        change = None if self.weight_change is None else self.weight_change()
        return weight if change is None else weight + change.to(weight.dtype)

    def plain(self) -> nn.Linear:
        """The ordinary layer with the same parameters."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear

    def matrices(self) -> dict[str, Tensor]:
        """Every weight on a grid by name, as `(rows, columns)`."""
        return {"weight": self.merged_weight()}

    def keep_rows_(self, name: str, kept: Tensor) -> None:
        """Keeps only the scales of the rows `kept`."""
        self.weight_quantizer.keep_rows_(kept)

    def extra_repr(self) -> str:
        """The scheme, for `print(model)`."""
        return f"{super().extra_repr()}, scheme={self.scheme}"


class FakeQuantEmbedding(nn.Embedding, PreparedLayer):
    """An embedding with a fake-quantized weight; only the rows that are looked up are rounded."""

    def __init__(self, embedding: nn.Embedding, scheme: Scheme, training: Training):
        super().__init__(**embedding_arguments(embedding), device="meta")
        self.weight = embedding.weight
        add_quantizers_(self, Scheme(scheme.weights), {"weight": tuple(embedding.weight.shape)}, Training(), ())
        self.scheme = scheme  # a tied head has the same scheme, and may quantize its input
        copy_kept_columns_(embedding, self)

    def forward(self, input: Tensor) -> Tensor:
        """The rows that `input` selects, rounded."""
        rows = super().forward(input)
        return self.weight_quantizer(rows.flatten(0, -2), kept_columns(self, "weight")).view(rows.shape)

    def plain(self) -> nn.Embedding:
        """The ordinary embedding with the same parameter."""
        embedding = nn.Embedding(**embedding_arguments(self), device="meta")
        embedding.weight = self.weight
        return embedding

    def matrices(self) -> dict[str, Tensor]:
        """Every weight on a grid by name, as `(rows, columns)`."""
        return {"weight": self.weight}


def fake_quantized_like(
    module: nn.Module, scheme: Scheme, training: Training, shapes: dict[str, tuple[int, int]], transposed: bool,
    dims: tuple[int, ...],
) -> nn.Module:  # fmt: skip
    """A copy of any other module that shares its parameters, and whose forward pass uses fake-quantized weights.

    Args:
        shapes: `{parameter name: (rows, columns)}`: the matrices that these parameters hold.
        transposed: Whether the parameters hold them as `(..., columns, rows)`.
        dims: Dimensions of the input that share a scale per token.
    """
    layer = with_class(module, _fake_quant_class(type(module)))
    layer.plain_class, layer.transposed = type(module), transposed
    add_quantizers_(layer, scheme, shapes, training, dims)
    return layer


def as_matrix(weight: Tensor, columns: int, transposed: bool) -> Tensor:
    """A parameter of any shape as `(rows, columns)`; a matrix product sums over the columns."""
    return (weight.mT if transposed else weight).reshape(-1, columns)


def from_matrix(matrix: Tensor, shape: tuple[int, ...], transposed: bool) -> Tensor:
    """The inverse of `as_matrix`, for a parameter of `shape`."""
    return matrix.view(*shape[:-2], shape[-1], shape[-2]).mT if transposed else matrix.view(shape)


@contextmanager
def weights_replaced(module: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Context in which `module` uses the tensors `weights` instead of its parameters of these names."""
    try:
        module.__dict__.update(weights)  # has priority over the parameters, which `nn.Module.__getattr__` looks up
        yield
    finally:
        for name in weights:
            module.__dict__.pop(name, None)


def with_class(module: nn.Module, new_class: type[nn.Module]) -> nn.Module:
    """A shallow copy of a module, with the same parameters, as an instance of another class."""
    twin = new_class.__new__(new_class)
    twin.__dict__ = {name: copy.copy(value) if type(value) is dict else value for name, value in vars(module).items()}
    return twin


def embedding_arguments(embedding: nn.Embedding) -> dict[str, Any]:
    """The constructor arguments of an equal embedding."""
    names = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    return {name: vars(embedding)[name] for name in names}


@cache
def _fake_quant_class(base: type[nn.Module]) -> type[nn.Module]:
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        dtype = autocast_dtype(inputs[0].device)
        if is_transposed_linear(self) and _multiplies_codes(self, inputs[0], dtype):
            return _product_of_codes(self, self.matrices()["weight"], inputs[0])
        if self.input_quantizer is not None:
            inputs = (self.input_quantizer(inputs[0]), *inputs[1:])
        on_grid = {}
        for name, matrix in self.matrices().items():
            values = self.get_submodule(f"{name}_quantizer")(matrix, kept_columns(self, name), dtype)
            on_grid[name] = from_matrix(values, getattr(self, name).shape, self.transposed)
        with weights_replaced(self, on_grid):
            return base.forward(self, *inputs, **kwargs)

    def matrices(self) -> dict[str, Tensor]:
        return {name: as_matrix(getattr(self, name), size, self.transposed) for name, size in self.columns.items()}

    def plain(self) -> nn.Module:
        module = with_class(self, self.plain_class)
        for name in ("input_quantizer", *(f"{name}_quantizer" for name in self.columns)):
            module._modules.pop(name, None)
        for name in ("plain_class", "columns", "transposed", "scheme", "input_quantizer"):
            module.__dict__.pop(name, None)
        return module

    members = {"forward": forward, "matrices": matrices, "plain": plain}
    return type(f"FakeQuant{base.__name__}", (base, PreparedLayer), members)
