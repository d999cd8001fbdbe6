"""The table of techniques: recipes, trainers, dry runs, reports and `prepare` read this one list."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hf_slim.core.config import SlimConfig
from hf_slim.core.lifecycle import Lifecycle, Technique
from hf_slim.distillation.callback import DistillationCallback
from hf_slim.distillation.config import DistillationConfig
from hf_slim.integration.config_json import check_saving, describe_converted, describe_prepared
from hf_slim.integration.previews import (
    Inputs,
    Preview,
    layer_schemes,
    preview_distillation,
    preview_pruning,
    preview_quantization,
)
from hf_slim.pruning.callback import PruningCallback
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.transform import PRUNING
from hf_slim.quantization.callback import QuantizationCallback
from hf_slim.quantization.config import QuantizationConfig
from hf_slim.quantization.transform import QUANTIZATION


@dataclass(frozen=True)
class Row:
    """One technique.

    Attributes:
        name: Of its section in a recipe.
        config: Its settings.
        callback: Runs it in a Trainer.
        preview: What it would do to a model, for a dry run.
        technique: How it prepares and converts a model; None: it leaves the model as it is.
        layers: What becomes of each layer, for the report; None: nothing to report.
    """

    name: str
    config: type[SlimConfig]
    callback: Callable[..., TrainerCallback]
    preview: Callable[[nn.Module, Any, Inputs], Preview]
    technique: Technique | None = None
    layers: Callable[[nn.Module, Any], list[dict[str, Any]]] | None = None


# in the order of the callbacks: a teacher copies the model before anything changes it
TECHNIQUES: tuple[Row, ...] = (
    Row("distillation", DistillationConfig, DistillationCallback, preview_distillation),
    Row("pruning", PruningConfig, PruningCallback, preview_pruning, PRUNING),
    Row("quantization", QuantizationConfig, QuantizationCallback, preview_quantization, QUANTIZATION, layer_schemes),
)
LIFECYCLE = Lifecycle(
    tuple(row.technique for row in TECHNIQUES if row.technique), check_saving, describe_prepared, describe_converted
)


def callbacks_for(configs: list[SlimConfig], own_teacher: PreTrainedModel | None = None) -> list[TrainerCallback]:
    """The callback of each config, in the order of the table.

    Args:
        own_teacher: The model for the teacher "self", if it is not the model that is trained.
    """
    callbacks: list[TrainerCallback] = []
    for row in TECHNIQUES:
        for config in (config for config in configs if type(config) is row.config):
            given: dict[str, Any] = {}
            if isinstance(config, DistillationConfig) and config.teacher == "self" and own_teacher is not None:
                given["teacher"] = own_teacher.eval().requires_grad_(False)
            callbacks.append(row.callback(config, **given))
    return callbacks


def previews_of(model: nn.Module, techniques: dict[str, SlimConfig], inputs: Inputs) -> list[Preview]:
    """The preview of every technique in use, in the order of the table.

    Raises: SlimError: for every error that its callback would raise before the first step.
    """
    return [row.preview(model, techniques[row.name], inputs) for row in TECHNIQUES if row.name in techniques]


def layers_of(model: nn.Module, techniques: dict[str, SlimConfig]) -> list[dict[str, Any]]:
    """Scheme, or reason why it remains in floating point, of each layer, for the report."""
    reporting = [(row.layers, techniques[row.name]) for row in TECHNIQUES if row.layers and row.name in techniques]
    return [layer for layers, config in reporting for layer in layers(model, config)]
