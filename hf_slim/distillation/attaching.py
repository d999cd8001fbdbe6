"""The teacher's term for trainers that do not optimise the model's own loss."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from hf_slim.core.errors import SlimError
from hf_slim.distillation.distiller import Distiller
from hf_slim.distillation.state import DistillationState


class Distilling(Protocol):
    """What is needed of the callback.

    Attributes:
        alpha: The weight of the teacher's term now, in [0, 1].
        distiller: Teachers and student.
        run: The state of the run.
    """

    alpha: float
    distiller: Distiller
    run: DistillationState


def optimises_own_loss_of_model(trainer: Any) -> bool:
    """Whether a `Trainer` optimises what the model computes, so that nothing needs to be wrapped."""
    plain = [base for base in type(trainer).__mro__ if base.__module__ == "transformers.trainer"]
    replaced = "compute_loss" in vars(trainer) or not plain or type(trainer).compute_loss is not plain[0].compute_loss
    return not replaced and trainer.label_smoother is None and trainer.compute_loss_func is None


def loss_with_term(trainer: Any, callback: Distilling) -> Callable[..., Any]:
    """The trainer's `compute_loss`, which mixes the term into the loss while the model trains.

    Args:
        trainer: A `transformers.Trainer`, or a subclass of it.
    Raises: SlimError: from the returned function, if the trainer never ran the model.
    """
    inner = trainer.compute_loss

    def compute_loss(
        model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return inner(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        run = callback.run
        run.keep_targets(inputs.get("labels"), callback.distiller.is_shifted, num_items_in_batch)
        found = inner(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        loss, outputs = found if return_outputs else (found, None)
        objective = run.take_objective()
        if objective is None:
            raise SlimError("The trainer computed a loss without running the model that is to be distilled.")
        scale = _scale(trainer, num_items_in_batch)
        run.add("task", loss / scale)
        loss = (1 - callback.alpha) * loss + scale * objective.total
        return (loss, outputs) if return_outputs else loss

    return compute_loss


def _scale(trainer: Any, items_in_batch: Any) -> float:
    """What the trainer multiplies a loss by that is divided by its count, or a mean where it does not count."""
    counted = items_in_batch is not None
    scale = 1.0
    if counted and trainer.args.average_tokens_across_devices:
        scale *= trainer.accelerator.num_processes  # the count is of all ranks, and gradients are averaged over them
    divides = trainer.loss_is_scaled_for_ga
    if divides is None:
        divides = (trainer.model_accepts_loss_kwargs and counted) or trainer.compute_loss_func is not None
    steps = getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
    if counted and not divides:
        scale *= steps  # it will be divided by the number of steps once more
    if not counted and divides:
        scale /= steps
    return scale
