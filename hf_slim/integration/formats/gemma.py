"""Folders of the method "gemma" of transformers (since 5.23), for any architecture: integers per channel.

Transformers reads them without another package, embeddings and heads included. It cannot tie quantized ones, so a head
that is the embedding is stored twice.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_slim.integration.formats.codes import (
    Layer,
    from_bytes,
    from_signed_codes,
    own_scales,
    row_scales,
    signed_codes,
    to_bytes,
)
from hf_slim.integration.formats.format import (
    FORMATS,
    Candidate,
    SaveFormat,
    is_plain_integers,
    name_pattern,
    reads,
)
from hf_slim.quantization.grids.grid import Grid
from hf_slim.quantization.scheme import Scheme

BITS = (2, 4, 8)


class GemmaFormat(SaveFormat):
    """Linear layers and embeddings with one scale for each row; activations as they are, or int8 with one scale."""

    name = "gemma"
    preference = 2
    ties = False
    holds = (
        "linear layers and embeddings with symmetric integers of 2, 4 or 8 bits per channel or tensor, activations as "
        "they are or int8 with a static scale"
    )
    read_by = "transformers 5.23 and newer, without another package"
    ignored = (r"\.output_activation_scale$", r"\.input_scale$", r"\.weight_scale$")  # of layers that have none

    def layer_reason(self, scheme: Scheme, plain: nn.Module) -> str | None:
        """Why the format does not hold a layer; None: it does."""
        weights = scheme.weights
        if not isinstance(plain, (nn.Linear, nn.Embedding)):
            return f"is neither a linear layer nor an embedding ({type(plain).__name__})"
        if not is_plain_integers(weights) or weights.bits not in BITS or weights.group_size:
            return f"has the grid '{scheme}'"
        if isinstance(plain, nn.Linear) and not _holds_activations(scheme.activations):
            return f"has activations on the grid of '{scheme}'"
        return None

    def model_reason(self, candidate: Candidate) -> str | None:
        """Names of layers that the loader of transformers would mistake for others."""
        settings = self.settings(candidate, torch.float32)
        kinds = (nn.Linear, nn.Embedding) if settings["quantize_embeddings"] else (nn.Linear,)
        return converted_otherwise(candidate, kinds, settings["modules_to_not_convert"])

    def settings(self, candidate: Candidate, dtype: torch.dtype) -> dict[str, Any]:
        """The bits that most layers have, the others by name, and what is not converted."""
        bits = {name: scheme.weights.bits for name, scheme in candidate.schemes.items()}
        counted = list(bits.values())
        usual = max(BITS, key=counted.count)
        prefix = getattr(candidate.plain, "base_model_prefix", "")
        others = {name_pattern(name, prefix): {"num_bits": n} for name, n in bits.items() if n != usual}
        embeddings = any(isinstance(candidate.plain.get_submodule(name), nn.Embedding) for name in bits)
        kinds = (nn.Linear, nn.Embedding) if embeddings else (nn.Linear,)
        return {
            "quant_method": self.name, "num_bits": usual, "quantize_embeddings": embeddings,
            "module_quant_configs": others or None, "modules_to_not_convert": candidate.unquantized(kinds),
        }  # fmt: skip

    def tensors(self, layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Codes and scales; of linear layers also those of input and output, where 0 stands for none."""
        bits, codes, scales = layer.scheme.weights.bits, signed_codes(layer), row_scales(layer)
        packed = codes.contiguous() if bits == 8 else to_bytes(codes, bits)
        if isinstance(layer, nn.Embedding):
            return {"embedding_quantized": packed, "embedding_scale": scales}
        none = torch.zeros((), dtype=torch.float32)
        static = layer.get_buffer("input_scale").view(()) if layer.scheme.activations is not None else none
        return {
            "weight": packed, "weight_scale": scales,
            "input_activation_scale": static.clone(), "output_activation_scale": none.clone(),
        }  # fmt: skip

    def conversions(self) -> list[WeightConverter]:
        """How the tensors of a file become those of packed layers."""
        return [
            reads("embedding_quantized", "weight", _read_codes),
            reads("embedding_scale", "weight_scale", own_scales),
            reads("input_activation_scale", "input_scale", lambda layer, scale: scale.view(1)),
            reads("weight_scale", "weight_scale", own_scales),
            reads("weight", "weight", _read_codes),
        ]


FORMATS.register("gemma")(GemmaFormat())


def converted_otherwise(
    candidate: Candidate, kinds: tuple[type[nn.Module], ...], not_converted: list[str]
) -> str | None:
    """Why a loader of transformers that converts all layers but the named ones would convert other layers.

    Its names are patterns, and some models keep layers in float32 whatever the config says.
    """
    kept = [*not_converted, *(getattr(candidate.plain, "_keep_in_fp32_modules", None) or ())]
    for name, module in candidate.plain.named_modules():
        if isinstance(module, kinds) and should_convert_module(name, kept) != (name in candidate.schemes):
            return f"'{name}' cannot be told from other layers by the names that are converted"
    return None


def _holds_activations(grid: Grid | None) -> bool:
    return grid is None or (is_plain_integers(grid) and grid.bits == 8 and grid.granularity == "tensor")


def _read_codes(layer: Layer, codes: Tensor) -> Tensor:
    grid, columns = layer.scheme.weights, layer.float_shape("weight")[1]
    if grid.bits < 8:
        codes = from_bytes(codes, grid.bits, columns)
    return from_signed_codes(codes, grid)
