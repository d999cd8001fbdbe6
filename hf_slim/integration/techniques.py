"""The table of techniques: recipes, trainers, dry runs, reports and `prepare` read this one list."""

from dataclasses import dataclass

from transformers import PreTrainedModel, TrainerCallback

from hf_slim.core.config import SlimConfig
from hf_slim.core.lifecycle import Lifecycle, Technique
from hf_slim.distillation.callback import DistillationCallback
from hf_slim.distillation.config import DistillationConfig
from hf_slim.integration.config_json import describe_converted, describe_prepared
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
        technique: How it prepares and converts a model; None: it leaves the model as it is.
    """

    name: str
    config: type[SlimConfig]
    callback: type[TrainerCallback]
    technique: Technique | None = None


# in the order of the callbacks: a teacher copies the model before anything changes it
TECHNIQUES: tuple[Row, ...] = (
    Row("distillation", DistillationConfig, DistillationCallback),
    Row("pruning", PruningConfig, PruningCallback, PRUNING),
    Row("quantization", QuantizationConfig, QuantizationCallback, QUANTIZATION),
)
LIFECYCLE = Lifecycle(
    tuple(row.technique for row in TECHNIQUES if row.technique), describe_prepared, describe_converted
)


def callbacks_for(configs: list[SlimConfig], own_teacher: PreTrainedModel | None = None) -> list[TrainerCallback]:
    """The callback of each config, in the order of the table.

    Args:
        own_teacher: What the teacher "self" means, where the student is only a part of it.
    """
    callbacks: list[TrainerCallback] = []
    for row in TECHNIQUES:
        for config in (config for config in configs if type(config) is row.config):
            is_taught = isinstance(config, DistillationConfig) and config.teacher == "self" and own_teacher is not None
            given = {"teacher": own_teacher.eval().requires_grad_(False)} if is_taught else {}
            callbacks.append(row.callback(config, **given))
    return callbacks
