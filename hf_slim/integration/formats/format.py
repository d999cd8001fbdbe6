"""What every format of a packed folder can say: whether it holds a model exactly, and how it writes and reads it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from hf_slim.core.contracts import PackedLayer
from hf_slim.core.host import is_transposed_linear
from hf_slim.core.registry import Registry
from hf_slim.integration.formats.codes import Layer
from hf_slim.quantization.grids.grid import Grid
from hf_slim.quantization.scheme import Scheme


@dataclass(frozen=True)
class Candidate:
    """A quantized model, as formats look at it before and after training.

    Attributes:
        schemes: Quantized layer -> its scheme.
        plain: The same model with ordinary layers, on the meta device.
        has_whole_zero_points: Whether all zero points are codes themselves.
        other_sizes: Whether layers have sizes that the model's config does not express.
        other_layout: Whether files of this kind of model are laid out otherwise than the model, such as its experts.
    """

    schemes: dict[str, Scheme]
    plain: nn.Module
    has_whole_zero_points: bool = True
    other_sizes: bool = False
    other_layout: bool = False

    def unquantized(self, kinds: tuple[type[nn.Module], ...]) -> list[str]:
        """Names of the layers of these kinds that stay in floating point."""
        layers = (name for name, module in self.plain.named_modules() if isinstance(module, kinds))
        return [name for name in layers if name not in self.schemes]


class SaveFormat:
    """One format of folder. `FORMATS` holds one object of each; a format has no state.

    Attributes:
        name: What `save_format` calls it; the `quant_method` that its config.json says, except for slim folders.
        preference: Lower ones are chosen first by `save_format: auto`.
        holds: The schemes that it holds exactly, for messages.
        read_by: What reads it, for messages.
        ties: Whether its readers can share a quantized weight between layers; otherwise it is stored twice.
        ignored: Patterns of names in its files that a packed layer has no use for.
    """

    name = ""
    preference = 0
    holds = ""
    read_by = ""
    ties = True
    ignored: tuple[str, ...] = ()

    def refusal(self, candidate: Candidate) -> str | None:
        """Why the format does not hold this model exactly, with what it holds; None: it does."""
        reason = self._reason(candidate)
        return f"{reason}. Format '{self.name}' holds {self.holds}." if reason else None

    def layer_reason(self, scheme: Scheme, plain: nn.Module) -> str | None:
        """Why the format does not hold a layer: the end of a sentence that starts with its name; None: it does.

        Args:
            plain: The ordinary layer.
        """
        raise NotImplementedError

    def model_reason(self, candidate: Candidate) -> str | None:
        """Why the format does not hold a model whose layers it holds one by one; None: it does."""
        return None

    def settings(self, candidate: Candidate, dtype: torch.dtype) -> dict[str, Any]:
        """What config.json says under `quantization_config`.

        Args:
            dtype: Of the float weights.
        """
        raise NotImplementedError

    def tensors(self, layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a packed layer in a file, without its bias, by their names after the name of the layer."""
        raise NotImplementedError

    def conversions(self) -> list[WeightConverter]:
        """How the tensors of a file become those of packed layers."""
        raise NotImplementedError

    def _reason(self, candidate: Candidate) -> str | None:
        if candidate.other_sizes:
            return "Layers have sizes that the config of the model cannot express"
        if candidate.other_layout:
            return "Files of this kind of model are laid out otherwise than the model, so codes cannot be written"
        for name, scheme in candidate.schemes.items():
            reason = self.layer_reason(scheme, candidate.plain.get_submodule(name))
            if reason:
                return f"'{name}' {reason}"
        return self.model_reason(candidate)


FORMATS: Registry[SaveFormat] = Registry("save format")


class Read(ConversionOps):
    """Turns one tensor of a file into the tensor of a packed layer; tensors of other layers stay as they are.

    Args:
        read: `(layer, tensor of the file) -> tensor of the layer`.
    """

    def __init__(self, read: Any):
        self.read = read

    def convert(  # type: ignore[override]  # the loader calls it by keyword
        self, input_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, Tensor]:
        """The tensor under its full name, as the loader of transformers asks for it."""
        found = next(iter(input_dict.values()))
        tensor = found[0] if isinstance(found, list) else found
        name = kwargs["full_layer_name"]
        layer = kwargs["model"].get_submodule(name.rpartition(".")[0])
        return {name: self.read(layer, tensor) if isinstance(layer, PackedLayer) else tensor}


def reads(source: str, target: str, read: Any) -> WeightConverter:
    """The tensor `source` of a file, turned by `read`, becomes the tensor `target` of a packed layer."""
    return WeightConverter(source, target, [Read(read)])


def columns_of(plain: Any) -> int:
    """What a product with the weight of an ordinary layer sums over."""
    return plain.weight.shape[0 if is_transposed_linear(plain) else -1]


def is_plain_integers(grid: Grid | None) -> bool:
    """Whether a grid is symmetric, signed integers without a fixed scale, rounded to nearest."""
    return (
        grid is not None and grid.kind == "int" and grid.symmetric and grid.signed and grid.scale is None
        and grid.rounding == "nearest"
    )  # fmt: skip


def name_pattern(name: str, prefix: str) -> str:
    """A regular expression for the name of a layer in a model with a head, and in the base model alone."""
    inner = name.removeprefix(f"{prefix}.") if prefix else name
    escaped = inner.replace(".", r"\.")
    return rf"(^|\.){escaped}$"
