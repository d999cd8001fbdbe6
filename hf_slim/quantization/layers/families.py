"""Families of layers that can be quantized: their weight matrices, and their training-time and packed forms."""

import dataclasses
import functools

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hf_slim.core.host import field_of, is_transposed_linear
from hf_slim.quantization.layers.packed import (
    PackedLinear,
    empty_packed_embedding,
    fill_input_,
    mark_filled_,
    packed_like,
)
from hf_slim.quantization.layers.training import (
    FakeQuantEmbedding,
    FakeQuantLinear,
    Training,
    fake_quantized_like,
)
from hf_slim.quantization.scheme import Scheme
from hf_slim.quantization.storage import fill_storage_

Shapes = dict[str, tuple[int, int]]


class LayerFamily:
    """Modules that are quantized in the same way. The first family of `FAMILIES` that matches a module is used."""

    transposed = False  # whether parameters are stored as (..., columns, rows)
    dims: tuple[int, ...] = (-1,)  # dimensions of the input that share a scale per token

    def matches(self, module: nn.Module) -> bool:
        """Whether the module belongs to this family: it has the right class, and the standard forward pass."""
        raise NotImplementedError

    def shapes(self, module: nn.Module) -> Shapes:
        """`{parameter name: (rows, columns)}` of every matrix; a matrix product sums over the columns."""
        return {"weight": tuple(module.weight.shape)}

    def floats(self, module: nn.Module, name: str) -> Tensor:
        """The values of a weight, dequantized if the module stores it in another form."""
        return getattr(module, name)

    def fitting(self, scheme: Scheme) -> Scheme:
        """The part of a scheme that these layers support."""
        return scheme

    def fake_quantized(self, module: nn.Module, scheme: Scheme, training: Training) -> nn.Module:
        """The training-time form, sharing all parameters."""
        return fake_quantized_like(module, scheme, training, self.shapes(module), self.transposed, self.dims)

    def empty_packed(self, module: nn.Module, scheme: Scheme) -> nn.Module:
        """The packed form of an ordinary module, without values."""
        return packed_like(module, scheme, self.shapes(module), self.transposed, self.dims)


class LinearFamily(LayerFamily):
    """`nn.Linear`."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module belongs to this family."""
        ordinary = type(module).forward is nn.Linear.forward
        # nn.MultiheadAttention reads the weight of its output projection without calling it
        return isinstance(module, nn.Linear) and ordinary and not isinstance(module, NonDynamicallyQuantizableLinear)

    def fake_quantized(self, module: nn.Module, scheme: Scheme, training: Training) -> nn.Module:
        """The training-time form, sharing all parameters."""
        return FakeQuantLinear(module, scheme, training)

    def empty_packed(self, module: nn.Module, scheme: Scheme) -> nn.Module:
        """The packed form, without values."""
        return _empty_linear(module, module.in_features, module.out_features, scheme)


class BitsAndBytesFamily(LayerFamily):
    """bitsandbytes' 4-bit layers under QLoRA adapters: their weights are dequantized, and not trained."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module belongs to this family."""
        return type(module).__name__ == "Linear4bit" and hasattr(module.weight, "quant_state")

    def shapes(self, module: nn.Module) -> Shapes:
        """`{parameter name: (rows, columns)}` of every matrix."""
        return {"weight": (module.out_features, module.in_features)}

    def floats(self, module: nn.Module, name: str) -> Tensor:
        """The values of a weight in floating point."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(module.weight.data, module.weight.quant_state)

    def fake_quantized(self, module: nn.Module, scheme: Scheme, training: Training) -> nn.Module:
        """The training-time form, sharing all parameters."""
        layer = FakeQuantLinear(module, scheme, training)
        layer.read_weight = functools.partial(self.floats, module, "weight")
        return layer

    def empty_packed(self, module: nn.Module, scheme: Scheme) -> nn.Module:
        """The packed form, without values."""
        return _empty_linear(module, module.in_features, module.out_features, scheme)


class EmbeddingFamily(LayerFamily):
    """`nn.Embedding`."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module belongs to this family."""
        return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward

    def fake_quantized(self, module: nn.Module, scheme: Scheme, training: Training) -> nn.Module:
        """The training-time form, sharing all parameters."""
        return FakeQuantEmbedding(module, scheme, training)

    def empty_packed(self, module: nn.Module, scheme: Scheme) -> nn.Module:
        """The packed form, without values."""
        return empty_packed_embedding(module, scheme)


class TransposedLinearFamily(LayerFamily):
    """GPT-2's `Conv1D`, a linear layer that stores its weight as `(in, out)`; its packed form is a `PackedLinear`."""

    transposed = True

    def matches(self, module: nn.Module) -> bool:
        """Whether the module belongs to this family."""
        return type(module).__name__ == "Conv1D" and is_transposed_linear(module) and module.weight.dim() == 2

    def shapes(self, module: nn.Module) -> Shapes:
        """`{parameter name: (rows, columns)}` of every matrix."""
        return {"weight": tuple(reversed(module.weight.shape))}

    def empty_packed(self, module: nn.Module, scheme: Scheme) -> nn.Module:
        """The packed form, without values."""
        in_features, out_features = module.weight.shape
        return _empty_linear(module, in_features, out_features, scheme)


class ConvolutionFamily(LayerFamily):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`. Columns are input channels times kernel positions.

    Activation scales with granularity "token" are per sample.
    """

    bases = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def matches(self, module: nn.Module) -> bool:
        """Whether the module belongs to this family."""
        return any(isinstance(module, base) and type(module).forward is base.forward for base in self.bases)

    def shapes(self, module: nn.Module) -> Shapes:
        """`{parameter name: (rows, columns)}` of every matrix."""
        return {"weight": (len(module.weight), module.weight[0].numel())}

    def fake_quantized(self, module: nn.Module, scheme: Scheme, training: Training) -> nn.Module:
        """The training-time form, sharing all parameters."""
        dims = tuple(range(-module.weight.dim() + 1, 0))
        return fake_quantized_like(module, scheme, training, self.shapes(module), False, dims)

    def empty_packed(self, module: nn.Module, scheme: Scheme) -> nn.Module:
        """The packed form, without values."""
        dims = tuple(range(-module.weight.dim() + 1, 0))
        return packed_like(module, scheme, self.shapes(module), False, dims)


class ExpertsFamily(LayerFamily):
    """Mixture-of-experts weights in stacked matrices `(experts, out, in)`.

    Their activations remain in floating point, because the inner ones are not accessible from outside the module.
    """

    def matches(self, module: nn.Module) -> bool:
        """Whether the module belongs to this family."""
        return bool(self._stacked(module)) and not vars(module).get("is_transposed", False)

    def shapes(self, module: nn.Module) -> Shapes:
        """`{parameter name: (rows, columns)}` of every matrix."""
        found = {name: module.get_parameter(name).shape for name in self._stacked(module)}
        return {name: (experts * rows, columns) for name, (experts, rows, columns) in found.items()}

    def fitting(self, scheme: Scheme) -> Scheme:
        """The scheme without activations: those inside the module are not accessible."""
        return dataclasses.replace(scheme, activations=None)

    def _stacked(self, module: nn.Module) -> list[str]:
        count = field_of(module, "num_experts")
        parameters = module.named_parameters(recurse=False)
        return [name for name, p in parameters if p.dim() == 3 and len(p) == count and p.is_floating_point()]


FAMILIES: list[LayerFamily] = [
    LinearFamily(), BitsAndBytesFamily(), EmbeddingFamily(), TransposedLinearFamily(), ConvolutionFamily(),
    ExpertsFamily(),
]  # fmt: skip


def family_of(module: nn.Module) -> LayerFamily | None:
    """The family that a module belongs to, or None if it cannot be quantized."""
    return next((family for family in FAMILIES if family.matches(module)), None)


@torch.no_grad()
def packed_form(layer: nn.Module) -> nn.Module:
    """The packed form of a fake-quantized layer, with exactly the values that its forward pass uses."""
    plain = layer.plain()
    packed = family_of(plain).empty_packed(plain, layer.scheme)
    for name, matrix in layer.matrices().items():
        fill_storage_(packed, name, matrix, layer.get_submodule(f"{name}_quantizer").state(matrix))
    fill_input_(packed, layer.input_quantizer)
    mark_filled_(packed)
    return packed


def _empty_linear(module: nn.Module, in_features: int, out_features: int, scheme: Scheme) -> PackedLinear:
    return PackedLinear(in_features, out_features, module.bias, scheme, module.weight.device)
