"""What the fields of `TrainingArguments` may hold: the host checks their types and ranges late, or not at all."""

import typing
from typing import Any

from transformers import TrainingArguments

from hf_slim.core.config import type_problem

# smallest value of a field, and what it must be in words
LEAST: dict[str, tuple[float, str]] = {
    "max_steps": (1, "at least 1, or -1 for whole epochs"),
    "num_train_epochs": (1e-9, "above 0"),
    "per_device_train_batch_size": (1, "at least 1"),
    "per_device_eval_batch_size": (1, "at least 1"),
    "gradient_accumulation_steps": (1, "at least 1"),
    "learning_rate": (0, "at least 0"),
    "seed": (0, "at least 0"),
}


def argument_problem(name: str, value: Any) -> str | None:
    """What a field of `TrainingArguments` must be, in words, if `value` is something else; None if it fits.

    Args:
        name: Of a field that exists.
    """
    wanted = type_problem(value, typing.get_type_hints(TrainingArguments)[name])
    if wanted is not None or name not in LEAST or value is None:
        return wanted
    least, words = LEAST[name]
    return None if value >= least or (name == "max_steps" and value == -1) else words
