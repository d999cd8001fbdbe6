"""From the names of teachers to models."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn

from hf_slim.core.errors import SlimConfigError, SlimError, SlimLoadError
from hf_slim.core.record import unwrapped
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.store.reader import is_stored_teacher
from hf_slim.distillation.teachers.live import LiveTeacher, check_teacher, freeze_, memory_advice, self_teacher
from hf_slim.distillation.teachers.retokenizer import Retokenizer
from hf_slim.distillation.teachers.stored import DiskTeacher

AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification", "AutoModelForImageClassification", "AutoModelForSpeechSeq2Seq", "AutoModel",
)  # fmt: skip
QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def teachers_for(
    student: nn.Module, given: Sequence[nn.Module], config: DistillationConfig, tokenizer: Any = None
) -> list[LiveTeacher | DiskTeacher]:
    """The given models, or those that the config names.

    Args:
        tokenizer: Of the data; a stored teacher must have had the same.

    Raises: SlimError: if one cannot be loaded, or its answers do not fit the student's.
    """
    stored = [] if given else [name for name in config.teachers if is_stored_teacher(name)]
    if stored and len(config.teachers) > 1:
        raise SlimConfigError(
            f"The stored teacher '{stored[0]}' cannot be mixed with others: it holds no whole answers."
        )
    if stored:
        return [DiskTeacher(stored[0], unwrapped(student), tokenizer, config)]
    teachers = [LiveTeacher(model) for model in given] or [_named(name, student, config) for name in config.teachers]
    weights = config.teacher_weights
    if weights is not None and len(weights) != len(teachers):
        raise SlimConfigError(
            f"`teacher_weights` has {len(weights)} entries for {len(teachers)} teachers. Give one each."
        )
    for teacher in teachers:
        if not teacher.is_student:
            check_teacher(student, teacher.model, bool(set(config.divergences) - {"universal"}))
    return teachers


def retokenizer_for(config: DistillationConfig, student: Any, teacher: Any) -> Retokenizer | None:
    """Between the tokenizers of student and teacher; None if the teacher reads the student's tokens.

    Args:
        teacher: The teacher's tokenizer; None: the named teacher's, for the loss that needs no common vocabulary.
    Raises: SlimError: if tokens of another vocabulary are asked for what only one vocabulary can say.
    """
    is_universal = set(config.divergences) == {"universal"}
    name = config.teachers[0]
    if teacher is None and is_universal and name != "self" and not is_stored_teacher(name) and student is not None:
        try:
            teacher = transformers.AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError):
            return None  # a teacher without a tokenizer reads what the student reads
        if teacher.get_vocab() == student.get_vocab():
            return None
    if teacher is None:
        return None
    if not is_universal or config.hidden or config.attention:
        raise SlimConfigError(
            "A teacher with a tokenizer of its own can only be compared by `losses: universal`, without `hidden` and "
            f"`attention`: positions and classes are others. Got losses {config.losses!r}."
        )
    return Retokenizer(student, teacher)


def _named(name: str, student: nn.Module, config: DistillationConfig) -> LiveTeacher:
    if name != "self":
        return LiveTeacher(freeze_(_load(name, unwrapped(student), config.teacher_load)))
    if hasattr(student, "disable_adapter"):
        return LiveTeacher(student, is_student=True)
    return LiveTeacher(self_teacher(student))


def _load(name: str, student: nn.Module, options: dict[str, str]) -> nn.Module:
    """The teacher `name`, with the head that the student has."""
    arguments = _load_arguments(options)
    for auto_name in AUTO_CLASSES:
        auto = getattr(transformers, auto_name)
        if type(student) in auto._model_mapping.values():
            try:
                return auto.from_pretrained(name, **arguments)
            except torch.OutOfMemoryError as error:
                raise SlimError(memory_advice(auto.from_config(_config(name)).to("meta"))) from error
            except (OSError, ImportError) as error:
                raise SlimLoadError(
                    f"The teacher '{name}' could not be loaded: {error} Pass 'self', a Hub id, or a folder that "
                    "`from_pretrained` accepts."
                ) from error
    raise SlimError(
        f"Which head a teacher for {type(student).__name__} needs is not known. Load it yourself and pass "
        "`DistillationCallback(config, teacher=model)`."
    )


def _config(name: str) -> Any:
    return transformers.AutoConfig.from_pretrained(name)


def _load_arguments(options: dict[str, str]) -> dict[str, Any]:
    arguments: dict[str, Any] = {name: options[name] for name in ("dtype", "device_map") if name in options}
    if "quantization" in options:
        compute = options.get("dtype", "float32")
        settings = QUANTIZED[options["quantization"]]
        if "load_in_4bit" in settings:
            settings = settings | {"bnb_4bit_compute_dtype": compute}
        arguments["quantization_config"] = transformers.BitsAndBytesConfig(**settings)
    return arguments
