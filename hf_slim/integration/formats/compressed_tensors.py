"""Folders of compressed-tensors: integers and fp8 in linear layers.

`pack-quantized` holds codes in int32 words, a dense stream for each row; `int-quantized` and `float-quantized` hold
one code in a byte. Codes and scales are written as they are; scales keep their dtype.
Source: github.com/vllm-project/compressed-tensors, version 0.20.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter

from hf_slim.integration.formats.codes import (
    Layer,
    as_stored_codes,
    from_signed_codes,
    from_signed_zero_points,
    from_words,
    own_scales,
    row_scales,
    signed_codes,
    signed_zero_points,
    stored_codes,
    to_words,
)
from hf_slim.integration.formats.format import (
    FORMATS,
    Candidate,
    SaveFormat,
    columns_of,
    is_plain_integers,
    name_pattern,
    reads,
)
from hf_slim.quantization.grids.grid import Grid
from hf_slim.quantization.scheme import Scheme

PACKED, BYTES, FLOATS = "pack-quantized", "int-quantized", "float-quantized"


class CompressedTensorsFormat(SaveFormat):
    """Linear layers on integer grids or fp8; embeddings and heads tied to them stay in floating point."""

    name = "compressed-tensors"
    preference = 1
    holds = (
        "linear layers with symmetric integers of 2 to 8 bits (per tensor, channel or group) or fp8, activations as "
        "they are or symmetric per token or static, zero points with w8a8 alone; `embeddings` stays null"
    )
    read_by = "transformers with the package compressed-tensors, vLLM and SGLang"
    # zero points and scales of layers whose grid gives them
    ignored = (r"\.weight_shape$", r"\.input_zero_point$", r"\.weight_zero_point$", r"\.weight_scale$")

    def layer_reason(self, scheme: Scheme, plain: nn.Module) -> str | None:
        """Why the format does not hold a layer; None: it does."""
        weights = scheme.weights
        if not isinstance(plain, nn.Linear):
            return f"is no linear layer ({type(plain).__name__})"
        if weights.kind not in ("int", "fp8") or (weights.kind == "fp8" and weights.group_size):
            return f"has the grid '{scheme}'"
        if weights.group_size and columns_of(plain) % weights.group_size:
            return f"has {columns_of(plain)} inputs, which are no whole groups of {weights.group_size}"
        if not (weights.symmetric and weights.signed) and _format(scheme) == PACKED:
            return f"has zero points ('{scheme}'), which transformers does not load in packed words"
        if not _holds_activations(scheme.activations):
            return f"has activations on a grid of its own ('{scheme}')"
        return None

    def model_reason(self, candidate: Candidate) -> str | None:
        """Zero points between two codes, or a model whose code wants weights where there are none yet."""
        if not candidate.has_whole_zero_points:
            return "Zero points are no whole numbers of steps"
        if _reads_weights(candidate):
            name = type(candidate.plain).__name__
            return f"{name} reads the weights of its layers while it is loaded, when this format has none yet"
        return None

    def settings(self, candidate: Candidate, dtype: torch.dtype) -> dict[str, Any]:
        """One group for each scheme, by class where there is only one and by name where there are several."""
        groups: dict[str, list[str]] = {}
        schemes = {str(scheme): scheme for scheme in candidate.schemes.values()}
        for name, scheme in candidate.schemes.items():
            groups.setdefault(str(scheme), []).append(name)
        prefix = getattr(candidate.plain, "base_model_prefix", "")
        described = {}
        for number, (text, names) in enumerate(groups.items()):
            targets = ["Linear"] if len(groups) == 1 else [f"re:.*{name_pattern(name, prefix)}" for name in names]
            described[f"group_{number}"] = _group(schemes[text], targets)
        formats = {group["format"] for group in described.values()}
        return {
            "quant_method": self.name, "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": described, "ignore": _ignored(candidate, prefix),
            "kv_cache_scheme": None, "global_compression_ratio": None,
        }  # fmt: skip

    def tensors(self, layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Codes, scales, zero points and the static scale of the input."""
        scheme = layer.scheme
        tensors = {"weight_scale": row_scales(layer)}
        if scheme.weights.kind == "fp8":
            tensors["weight"] = stored_codes(layer).contiguous().view(torch.float8_e4m3fn)
            return tensors | _input_scale(layer)
        codes, points, bits = signed_codes(layer), signed_zero_points(layer), scheme.weights.bits
        if _format(scheme) == BYTES:
            tensors["weight"] = codes.contiguous()
        else:
            tensors["weight_packed"] = to_words(codes, bits)
            tensors["weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
        if points is not None:
            tensors["weight_zero_point"] = points.to(torch.int8)
        return tensors | _input_scale(layer)

    def conversions(self) -> list[WeightConverter]:
        """How the tensors of a file become those of packed layers."""
        return [
            reads("weight_packed", "weight", _read_words),
            reads("weight_zero_point", "weight_zero_point", from_signed_zero_points),
            reads("weight_scale", "weight_scale", own_scales),
            reads("weight", "weight", _read_bytes),
        ]


FORMATS.register("compressed-tensors")(CompressedTensorsFormat())


def _reads_weights(candidate: Candidate) -> bool:
    """Whether the initialisation of a model reads weights of other layers, as T5's does."""
    copied: Any = copy.deepcopy(candidate.plain)
    for name in candidate.schemes:
        del copied.get_submodule(name).weight
    with torch.random.fork_rng(devices=[]):
        for name, module in copied.named_modules():
            try:
                if name not in candidate.schemes:
                    copied._init_weights(module)
            except Exception as error:  # whatever else it raises about tensors without values does not matter
                if isinstance(error, AttributeError) and "weight" in str(error):
                    return True
    return False


def _ignored(candidate: Candidate, prefix: str) -> list[str]:
    """Linear layers in floating point: in the base model alone their names lack the prefix."""
    names = candidate.unquantized((nn.Linear,))
    return [f"re:.*{name_pattern(name, prefix)}" if name.startswith(f"{prefix}.") else name for name in names]


def _holds_activations(grid: Grid | None) -> bool:
    if grid is None or grid.kind == "fp8":
        return grid is None or grid.scale is None
    return is_plain_integers(grid)


def _format(scheme: Scheme) -> str:
    if scheme.weights.kind == "fp8":
        return FLOATS
    return BYTES if scheme.activations is not None and scheme.weights.bits == 8 else PACKED


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights, activations = scheme.weights, scheme.activations
    described: dict[str, Any] = {"targets": targets, "format": _format(scheme)}
    described["weights"] = {
        "num_bits": weights.bits, "type": "int" if weights.kind == "int" else "float",
        "symmetric": weights.symmetric and weights.signed,
        "strategy": "group" if weights.group_size else "channel", "group_size": weights.group_size,
        "dynamic": False,
    }  # fmt: skip
    described["input_activations"] = None if activations is None else {
        "num_bits": activations.bits, "type": "int" if activations.kind == "int" else "float", "symmetric": True,
        "strategy": activations.granularity, "dynamic": activations.granularity == "token",
    }  # fmt: skip
    return described


def _input_scale(layer: Layer) -> dict[str, Tensor]:
    activations = layer.scheme.activations
    is_static = activations is not None and activations.granularity == "tensor"
    if not is_static:
        return {}
    # compressed-tensors has a zero point for static scales, symmetric or not
    return {"input_scale": layer.get_buffer("input_scale"), "input_zero_point": torch.zeros(1, dtype=torch.int8)}


def _read_words(layer: Layer, words: Tensor) -> Tensor:
    grid, columns = layer.scheme.weights, layer.float_shape("weight")[1]
    return from_signed_codes(from_words(words, grid.bits, columns), grid)


def _read_bytes(layer: Layer, codes: Tensor) -> Tensor:
    grid = layer.scheme.weights
    if grid.kind == "fp8":
        return as_stored_codes(codes.view(torch.uint8), grid)
    return from_signed_codes(codes, grid)
