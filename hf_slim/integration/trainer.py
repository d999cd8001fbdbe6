"""Builds the Trainer of a run, orders its callbacks, and checks its arguments.

The host checks types and ranges of `TrainingArguments` late, or not at all.
"""

import typing
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_slim.core.config import type_problem
from hf_slim.integration.techniques import TECHNIQUES

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


def trainer_for(
    model: PreTrainedModel, args: TrainingArguments, loss_counts_items: bool = True, **arguments: Any
) -> Trainer:
    """A Trainer that divides the loss as the model does, and whose reporters get the values that callbacks log.

    Args:
        loss_counts_items: Whether the model divides its loss by the Trainer's count of predictions. Where it does not,
            the Trainer must not count them either, or gradients grow with accumulation.
        arguments: Any others of `Trainer`.
    """
    trainer = Trainer(model, args, **arguments)
    trainer.model_accepts_loss_kwargs = trainer.model_accepts_loss_kwargs and loss_counts_items
    log_before_reporters_(trainer)
    return trainer


def log_before_reporters_(trainer: Trainer) -> Trainer:
    """Moves hf_slim's callbacks before the reporters, so that TensorBoard and W&B get the values that they log.

    A Trainer calls its own reporters first, and they take the log as it is then. Progress bars and
    `trainer.state.log_history` need no such call.
    Returns: the same trainer.
    """
    handler, ours = (
        trainer.callback_handler,
        tuple(row.callback for row in TECHNIQUES if isinstance(row.callback, type)),
    )
    handler.callbacks.sort(key=lambda callback: not isinstance(callback, ours))  # stable within each kind
    return trainer


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
