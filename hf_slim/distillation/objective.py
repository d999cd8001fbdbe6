"""From answers and labels to one loss, normalised as the task loss is, so that accumulation stays exact."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.losses.answers import Answers
from hf_slim.distillation.losses.divergences import DIVERGENCES
from hf_slim.distillation.losses.fused import LogitLoss, Term, logit_sums
from hf_slim.distillation.targets import Targets


@dataclass(frozen=True)
class Objective:
    """The parts of one micro-batch's loss.

    Attributes:
        total: What is optimised; without the task's share where the trainer computes the task loss itself.
        parts: The values of "task" (if it is part of the total), of every term by name, and of "distillation": the
            terms' weighted sum before `alpha`.
    """

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Student:
    """What the student answered.

    Attributes:
        states: `(batch, [length,] width)`, what enters the output layer; or the logits.
        head: The output layer; None where `states` are the logits.
        n_classes: Columns of the logits.
        task: The model's own loss; None where it is computed here with the terms, or by the trainer.
        task_mean: The mean that an encoder's own loss may be, of logits and labels; None: cross-entropy.
        sums: Terms beside the divergences: name -> (its weight, its sum over predictions).
    """

    states: Tensor
    head: nn.Module | None
    n_classes: int
    task: Tensor | None = None
    task_mean: Callable[[Tensor, Tensor], Tensor] | None = None
    sums: dict[str, tuple[float, Tensor]] = field(default_factory=dict)


def objective_of(
    student: Student, teacher: Answers | None, targets: Targets, config: DistillationConfig, alpha: float,
    computes_task: bool,
) -> Objective:  # fmt: skip
    """The task loss and the distillation terms of one micro-batch, mixed.

    Every term is a sum divided by what the Trainer counts over the whole accumulated batch, exactly like the causal
    task loss; a mean per micro-batch would weigh short ones too much. Many encoders' own loss is such a mean whatever
    the Trainer counts; it is brought to the same count here.

    Args:
        teacher: None where nothing of its answers is compared.
        alpha: The teacher's weight now.
        computes_task: Whether the task loss is computed here from the labels.
    Raises: SlimError: if the answers do not fit each other.
    """
    weights = config.divergences if teacher is not None else {}
    terms = [Term(DIVERGENCES[name], config.parameter_of(name), alpha * weight) for name, weight in weights.items()]
    loss = LogitLoss((1 - alpha) if computes_task else 0.0, terms, config.temperature, config.top_k)
    divisor, total, parts = targets.divisor, 0, {}
    if loss.task_weight or terms:
        _check_classes(student, teacher, config)
        found = logit_sums(
            student.states.flatten(0, -2), student.head, targets.rows(), teacher, loss, student.n_classes
        )
        total = found.total / divisor
        parts = dict(zip(weights, found.terms * config.temperature**2 / divisor, strict=True))
        parts |= {"task": found.task / divisor} if loss.task_weight else {}
    for name, (weight, value) in student.sums.items():
        total = total + alpha * weight * value / divisor
        parts[name] = value.detach() / divisor
    weights = weights | {name: weight for name, (weight, _) in student.sums.items()}
    parts["distillation"] = sum(weight * parts[name] for name, weight in weights.items())
    if student.task is not None:
        task = student.task * _task_share(student, targets)
        total, parts["task"] = total + (1 - alpha) * task, task.detach()
    return Objective(total, parts)


def _check_classes(student: Student, teacher: Answers | None, config: DistillationConfig) -> None:
    theirs = teacher.n_classes if teacher is not None else None
    if theirs is not None and theirs != student.n_classes and set(config.divergences) != {"universal"}:
        raise SlimError(
            f"The teacher answers with {theirs} classes, the student with {student.n_classes}. Both must share one "
            "vocabulary or label set; for another vocabulary use `losses: universal`."
        )


@torch.no_grad()
def _task_share(student: Student, targets: Targets) -> Tensor | float:
    """What to multiply a model's own loss by: 1 if it is a sum over the whole batch's count, a share if it is a mean.

    Models do not say which they return, but its value does: the mean of their logits' losses is at hand.
    """
    if targets.items_in_batch is None or targets.shifted or student.head is not None:
        return 1.0
    if student.task_mean is not None:
        mean, counted = student.task_mean(student.states.float(), targets.labels), targets.labels.numel()
    else:
        rows = targets.rows()
        answers = student.states.flatten(0, -2)[rows.places].float()
        mean, counted = torch.nn.functional.cross_entropy(answers, rows.labels), len(rows.places)
    share = counted / torch.as_tensor(targets.items_in_batch, device=student.task.device)
    is_sum = (student.task - mean * share).abs() < (student.task - mean).abs()
    return torch.where(is_sum, torch.ones_like(share), share)
