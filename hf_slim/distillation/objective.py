"""The loss of one micro-batch, normalised like the task loss, so that gradient accumulation is exact."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.losses.divergences import DIVERGENCES
from hf_slim.distillation.losses.fused import LogitLoss, Term, logit_sums
from hf_slim.distillation.losses.predictions import Predictions
from hf_slim.distillation.targets import IGNORED, Targets


@dataclass(frozen=True)
class Objective:
    """The parts of one micro-batch's loss.

    Attributes:
        total: The loss that is optimised; without the task loss if the trainer computes that.
        parts: Values without gradient: "task" (if it is part of the total), every term by name, and "distillation",
            the weighted sum of the terms before it is multiplied by `alpha`.
    """

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Student:
    """Outputs of the student.

    Attributes:
        states: `(batch, [length,] width)`, the input of the output layer; or the logits.
        head: The output layer; None if `states` are the logits.
        n_classes: Columns of the logits.
        task: The model's own loss; None if it is computed together with the terms, or by the trainer.
        task_mean: The mean loss as a function of logits and labels, for a model whose own loss may be a mean; None:
            cross-entropy.
        sums: Terms other than the divergences: name -> (its weight, its sum over predictions).
    """

    states: Tensor
    head: nn.Module | None
    n_classes: int
    task: Tensor | None = None
    task_mean: Callable[[Tensor, Tensor], Tensor] | None = None
    sums: dict[str, tuple[float, Tensor]] = field(default_factory=dict)


def objective_of(
    student: Student, teacher: Predictions | None, targets: Targets, config: DistillationConfig, alpha: float,
    computes_task: bool,
) -> Objective:  # fmt: skip
    """Loss of one micro-batch: `(1 - alpha) * task + alpha * terms`.

    Like the causal task loss, a term is a sum divided by the Trainer's count of predictions in the accumulated batch;
    a mean per micro-batch would give tokens of short ones too much weight. A model's own loss that is such a mean, as
    in many encoders, is rescaled.

    Args:
        student: Outputs of the student.
        teacher: Predictions of the teacher; None if no divergence is computed.
        targets: Labels and their count.
        config: Divergences, temperature and top_k.
        alpha: Current weight of the teacher's terms, in [0, 1].
        computes_task: Whether the task loss is computed here from the labels.
    Raises: SlimError: if student and teacher have different numbers of classes.
    """
    weights = config.divergences if teacher is not None else {}
    terms = [Term(DIVERGENCES[name], config.parameter_of(name), alpha * weight) for name, weight in weights.items()]
    loss = LogitLoss((1 - alpha) if computes_task else 0.0, terms, config.temperature, config.top_k)
    divisor = targets.divisor
    total: Tensor | float = 0
    parts: dict[str, Tensor] = {}
    if loss.task_weight or terms:
        _check_classes(student, teacher, config)
        states = student.states.flatten(0, -2)
        found = logit_sums(states, student.head, targets.rows(), teacher, loss, student.n_classes)
        total = found.total / divisor
        parts = dict(zip(weights, found.terms * config.temperature**2 / divisor, strict=True))
        parts |= {"task": found.task / divisor} if loss.task_weight else {}
    for name, (weight, value) in student.sums.items():
        total, parts[name] = total + alpha * weight * value / divisor, value.detach() / divisor
    weights = weights | {name: weight for name, (weight, _) in student.sums.items()}
    parts["distillation"] = sum(weight * parts[name] for name, weight in weights.items())
    if student.task is not None and _has_labels(student, targets):
        task = student.task * _task_share(student, targets)
        total, parts["task"] = total + (1 - alpha) * task, task.detach()
    return Objective(total, parts)


def _check_classes(student: Student, teacher: Predictions | None, config: DistillationConfig) -> None:
    theirs = teacher.n_classes if teacher is not None else None
    if theirs is not None and theirs != student.n_classes and set(config.divergences) != {"universal"}:
        raise SlimError(
            f"The teacher has {theirs} classes and the student has {student.n_classes}. Both must have the same "
            "vocabulary or label set; for another vocabulary use `losses: universal`."
        )


def _has_labels(student: Student, targets: Targets) -> bool:
    """Whether the micro-batch has a label; the mean over none, which a model then returns as its loss, is NaN."""
    return student.task_mean is not None or bool((targets.position_labels != IGNORED).any())


@torch.no_grad()
def _task_share(student: Student, targets: Targets) -> Tensor | float:
    """Factor of a model's own loss: 1 if it is a sum divided by the Trainer's count, a share if it is a mean.

    A model does not say which of the two it returns. Its value does: it is compared with the mean and with the share.
    """
    if targets.items_in_batch is None or targets.shifted or student.head is not None:
        return 1.0
    if student.task_mean is not None:
        mean, counted = student.task_mean(student.states.float(), targets.labels), targets.labels.numel()
    else:
        rows = targets.rows()
        logits = student.states.flatten(0, -2)[rows.places].float()
        mean, counted = torch.nn.functional.cross_entropy(logits, rows.labels), len(rows.places)
    share = counted / torch.as_tensor(targets.divisor, device=student.task.device)
    is_sum = (student.task - mean * share).abs() < (student.task - mean).abs()
    return torch.where(is_sum, torch.ones_like(share), share)
