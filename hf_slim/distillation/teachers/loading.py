"""Loading the teachers that a config names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hf_slim.core.errors import SlimConfigError, SlimError, SlimLoadError
from hf_slim.core.files.model_folder import check_model_folder, refuse_pickles
from hf_slim.core.host import method_or_none
from hf_slim.core.record import unwrapped
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.store.reader import is_stored_teacher
from hf_slim.distillation.teachers.live import LiveTeacher, check_teacher, freeze_, memory_advice, self_teacher
from hf_slim.distillation.teachers.retokenizer import Retokenizer
from hf_slim.distillation.teachers.stored import DiskTeacher

AUTO_CLASSES = (
    transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForMaskedLM,
    transformers.AutoModelForSequenceClassification, transformers.AutoModelForTokenClassification,
    transformers.AutoModelForImageClassification, transformers.AutoModelForSpeechSeq2Seq, transformers.AutoModel,
)  # fmt: skip
BITSANDBYTES_OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def teachers_for(
    student: nn.Module, given: Sequence[nn.Module], config: DistillationConfig, tokenizer: Any = None
) -> list[LiveTeacher | DiskTeacher]:
    """Teachers of a run: the given models, or those that the config names.

    Args:
        student: The model in training.
        given: Frozen models; if there are any, the names in the config are not used.
        config: Names of the teachers, and options for loading them.
        tokenizer: Tokenizer of the data; a stored teacher must have been made with the same.
    Raises: SlimError: if a teacher cannot be loaded, or its predictions do not fit the student.
    """
    stored = [] if given else [name for name in config.teachers if is_stored_teacher(name)]
    if stored and len(config.teachers) > 1:
        raise SlimConfigError(
            f"The stored teacher '{stored[0]}' cannot be mixed with others, because it contains only the most "
            "probable classes. Name it alone, or name models only."
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
    """`Retokenizer` from the student's to the teacher's tokens; None if the teacher reads the student's tokens.

    Args:
        config: Names teacher and losses.
        student: The student's tokenizer; None if the Trainer has none.
        teacher: The teacher's tokenizer; None: with `losses: universal`, that of the named teacher.
    Raises: SlimError: if a loss needs one common vocabulary.
    """
    is_universal = set(config.divergences) == {"universal"}
    name = config.teachers[0]
    if teacher is None and is_universal and name != "self" and not is_stored_teacher(name) and student is not None:
        try:
            teacher = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError):
            return None  # a teacher without a tokenizer reads the student's tokens
        if teacher.get_vocab() == student.get_vocab():
            return None
    if teacher is None:
        return None
    if not is_universal or config.hidden or config.attention:
        raise SlimConfigError(
            "A teacher with another tokenizer has other positions and classes, so it can only be compared by "
            f"`losses: universal`, without `hidden` and `attention`. Got losses {config.losses!r}."
        )
    return Retokenizer(student, teacher)


def _named(name: str, student: nn.Module, config: DistillationConfig) -> LiveTeacher:
    if name != "self":
        return LiveTeacher(freeze_(_load(name, unwrapped(student), config.teacher_load)))
    if method_or_none(student, "disable_adapter") is not None:
        return LiveTeacher(student, is_student=True)
    return LiveTeacher(self_teacher(student))


def _load(name: str, student: nn.Module, options: dict[str, str]) -> nn.Module:
    """Load the teacher `name` with the same kind of head as the student."""
    arguments = _load_arguments(options)
    if Path(name).is_dir() and check_model_folder(Path(name)) is None:
        refuse_pickles(Path(name))
    for auto in AUTO_CLASSES:
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
        f"No auto class is known that loads a teacher for {type(student).__name__}. Load the teacher yourself and "
        "pass `DistillationCallback(config, teacher=model)`."
    )


def _config(name: str) -> Any:
    return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)


def _load_arguments(options: dict[str, str]) -> dict[str, Any]:
    arguments: dict[str, Any] = {name: options[name] for name in ("dtype", "device_map") if name in options}
    arguments["trust_remote_code"] = False
    if "quantization" in options:
        compute = options.get("dtype", "float32")
        settings = BITSANDBYTES_OPTIONS[options["quantization"]]
        if "load_in_4bit" in settings:
            settings = settings | {"bnb_4bit_compute_dtype": compute}
        arguments["quantization_config"] = transformers.BitsAndBytesConfig(**settings)
    return arguments
