"""Adding the teacher's term to the loss of trainers that do not optimise the model's own loss."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from hf_slim.core.errors import SlimError
from hf_slim.distillation.distiller import Distiller
from hf_slim.distillation.state import DistillationState


class DistillingCallback(Protocol):
    """The part of `DistillationCallback` that is used here.

    Attributes:
        alpha: Current weight of the teacher's term, in [0, 1].
        distiller: Teachers and student.
        run: State of the run.
    """

    alpha: float
    distiller: Distiller
    run: DistillationState


def optimises_own_loss_of_model(trainer: Any) -> bool:
    """Whether a `Trainer` optimises the loss that the model returns, so that `compute_loss` need not be wrapped."""
    plain = [base for base in type(trainer).__mro__ if base.__module__ == "transformers.trainer"]
    replaced = "compute_loss" in vars(trainer) or not plain or type(trainer).compute_loss is not plain[0].compute_loss
    return not replaced and trainer.label_smoother is None and trainer.compute_loss_func is None


def loss_with_term(trainer: Any, callback: DistillingCallback) -> Callable[..., Any]:
    """Wrap the trainer's `compute_loss` so that, in training mode, it adds the teacher's term to the loss.

    Args:
        trainer: A `transformers.Trainer`, or a subclass of it.
        callback: Gives the weight of the term and the state of the run.
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
            raise SlimError(
                "The trainer computed a loss without a forward pass of the student, so there is no teacher's term to "
                "add. Use a trainer whose `compute_loss` calls the model."
            )
        scale = _loss_scale(trainer, num_items_in_batch)
        run.add("task", loss / scale)
        loss = (1 - callback.alpha) * loss + scale * objective.total
        return (loss, outputs) if return_outputs else loss

    return compute_loss


def _loss_scale(trainer: Any, items_in_batch: Any) -> float:
    """Factor that makes the term comparable with the trainer's loss.

    The term is divided by the trainer's count of items if there is one, and a mean over the micro-batch otherwise. The
    trainer may still divide by the number of accumulation steps, and averages gradients over processes.
    """
    counted = items_in_batch is not None
    scale = 1.0
    if counted and trainer.args.average_tokens_across_devices:
        scale *= trainer.accelerator.num_processes  # all ranks are counted; gradients are averaged over them
    divides = trainer.loss_is_scaled_for_ga
    if divides is None:
        divides = (trainer.model_accepts_loss_kwargs and counted) or trainer.compute_loss_func is not None
    steps = vars(trainer).get("current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
    if counted and not divides:
        scale *= steps  # the trainer divides by the number of steps
    if not counted and divides:
        scale /= steps
    return scale
