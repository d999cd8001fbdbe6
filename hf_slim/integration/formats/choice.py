"""Which format a quantized model is saved in: the first that holds it exactly, or the one that was asked for."""

import logging
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from hf_slim.core.contracts import PackedLayer
from hf_slim.core.errors import SlimConfigError
from hf_slim.integration.formats import bitsandbytes, compressed_tensors, gemma, slim  # noqa: F401  registers them
from hf_slim.integration.formats.codes import Layer, are_whole
from hf_slim.integration.formats.format import FORMATS, Candidate, SaveFormat

logger = logging.getLogger(__name__)
AUTO = "auto"


def packed_candidate(model: nn.Module, plain: nn.Module, other_sizes: bool) -> Candidate:
    """A packed model as formats look at it.

    Args:
        plain: The same model with ordinary layers, on the meta device.
        other_sizes: Whether the sizes of its layers are not those that its config alone gives.
    """
    layers: dict[str, Layer] = {
        name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)
    }
    whole = all(are_whole(layer) for layer in layers.values() if _is_integer_matrix(layer))
    schemes = {name: layer.scheme for name, layer in layers.items()}
    return Candidate(schemes, plain, whole, other_sizes, has_other_layout(plain))


def _is_integer_matrix(layer: Layer) -> bool:
    return layer.scheme.weights.kind == "int" and isinstance(layer, nn.Linear | nn.Embedding)


def has_other_layout(plain: Any) -> bool:
    """Whether saving a model of this kind splits or merges weights, which codes do not survive."""
    conversions = get_model_conversion_mapping(plain, add_legacy=False)
    return any(isinstance(conversion, WeightConverter) for conversion in conversions)


def check_format(candidate: Candidate, wanted: str) -> None:
    """Raises SlimConfigError if the format that was asked for does not hold the model exactly."""
    refusal = None if wanted == AUTO else FORMATS[wanted].refusal(candidate)
    if refusal:
        raise SlimConfigError(f"`save_format: {wanted}` is not possible: {refusal} {_possible(candidate)}")


def chosen_format(candidate: Candidate, wanted: str) -> SaveFormat:
    """The format that was asked for, or with "auto" the first that holds the model exactly; logs which and why.

    A format that was asked for and turns out not to hold what was trained is replaced, with a warning: the model in
    memory must not be lost.
    """
    refusals: dict[str, str] = {}
    for name in _by_preference() if wanted == AUTO else (wanted, slim.SlimFormat.name):
        refusal = FORMATS[name].refusal(candidate)
        if refusal is None:
            break
        refusals[name] = refusal
    why = " ".join(f"Not {name}: {refusal}" for name, refusal in refusals.items())
    text = "Saved in format '%s', which loads in %s. %s"
    logger.log(logging.INFO if wanted in (AUTO, name) else logging.WARNING, text, name, FORMATS[name].read_by, why)
    return FORMATS[name]


def _by_preference() -> list[str]:
    return sorted(FORMATS, key=lambda name: FORMATS[name].preference)


def _possible(candidate: Candidate) -> str:
    names = [name for name in _by_preference() if FORMATS[name].refusal(candidate) is None]
    return f"Formats that hold this model: {', '.join(names)}."
