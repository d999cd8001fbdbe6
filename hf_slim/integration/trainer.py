"""Builds the Trainer of a run, and orders its callbacks."""

from typing import Any

from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_slim.integration.techniques import TECHNIQUES


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
