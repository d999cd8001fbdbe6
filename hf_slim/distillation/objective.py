"""From logits and labels to one loss, normalised as the task loss is, so that accumulation stays exact."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_slim.core.errors import SlimError
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.losses import forward_kl_sum


@dataclass(frozen=True)
class Objective:
    """The parts of one micro-batch's loss.

    Attributes:
        total: What the Trainer optimises.
        task: The task loss in the same normalisation.
        distillation: The teacher's term before its weight `alpha`.
    """

    total: Tensor
    task: Tensor
    distillation: Tensor


@dataclass(frozen=True)
class Targets:
    """What one micro-batch is to predict, and how much there is to predict in all.

    Attributes:
        labels: `(batch, length)` with -100 where nothing is predicted, or `(batch,)` for one answer per example.
        shifted: Whether position `i` predicts label `i + 1`, as in causal language models.
        items_in_batch: Predictions in all accumulated micro-batches together; None if only this one counts.
    """

    labels: Tensor
    shifted: bool
    items_in_batch: Tensor | int | None = None

    def rows(self) -> Tensor:
        """Indices into `logits.flatten(0, -2)` of the rows that predict something."""
        labels = self.labels
        if self.shifted:
            labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        return (labels.reshape(-1) != -100).nonzero().squeeze(1)


def mix_losses(
    task: Tensor, student: Tensor, teacher: Tensor, targets: Targets, config: DistillationConfig
) -> Objective:
    """The task loss and the distillation term of one micro-batch, mixed.

    The term is a sum over rows divided by what the Trainer counts over the whole accumulated batch, exactly like the
    causal task loss; a mean per micro-batch would weigh short ones too much. Many encoders' own loss is such a mean
    whatever the Trainer counts; it is brought to the same count here.

    Args:
        task: The model's own loss, a scalar.
        student: Logits `(batch, [length,] n_classes)`.
        teacher: Logits of the same shape.
        config: Gives `alpha` and `temperature`; the term is multiplied by the square of the temperature, so that
            gradients keep their size.
    """
    if student.shape != teacher.shape:
        raise SlimError(
            f"The teacher's logits have shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}. "
            "Both must see the same inputs and share one vocabulary or label set."
        )
    rows, items = targets.rows(), targets.items_in_batch
    divergence = forward_kl_sum(student.flatten(0, -2), teacher.flatten(0, -2), rows, config.temperature)
    distillation = config.temperature**2 * divergence / (max(len(rows), 1) if items is None else items)
    if items is not None and not targets.shifted:
        task = task * _task_share(task, student.flatten(0, -2)[rows], targets.labels.reshape(-1)[rows], items)
    return Objective((1 - config.alpha) * task + config.alpha * distillation, task, distillation)


@torch.no_grad()
def _task_share(task: Tensor, answers: Tensor, labels: Tensor, items_in_batch: Tensor | int) -> Tensor:
    """What to multiply a model's own loss by: 1 if it is a sum over the whole batch's count, a share if it is a mean.

    Models do not say which they return, but its value does: the cross-entropy of their logits is at hand.
    """
    mean = torch.nn.functional.cross_entropy(answers.float(), labels)
    share = len(labels) / torch.as_tensor(items_in_batch, device=task.device)
    is_sum = (task - mean * share).abs() < (task - mean).abs()
    return torch.where(is_sum, torch.ones_like(share), share)
