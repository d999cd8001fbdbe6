"""Losses for outputs that are no distribution over classes: regression and multi-label classification."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_slim.core.registry import Registry

# outputs of student and teacher, `(batch, n_outputs)` each -> sum of their distances
OUTPUT_LOSSES: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry("problem type")
# problem type -> the model's own loss, a mean, as a function of outputs and labels
TASK_MEANS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "regression": lambda outputs, labels: F.mse_loss(outputs.reshape(labels.shape), labels),
    "multi_label_classification": lambda outputs, labels: F.binary_cross_entropy_with_logits(outputs, labels),
}


@OUTPUT_LOSSES.register("regression")
def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the predicted numbers, summed over batch and outputs.

    Args:
        student: `(batch, n_outputs)`.
        teacher: `(batch, n_outputs)`.
    """
    return (student.float() - teacher.float()).square().sum()


@OUTPUT_LOSSES.register("multi_label_classification")
def binary_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the two probabilities of each label, in nats, summed over batch and labels.

    Args:
        student: Logits, `(batch, n_labels)`.
        teacher: Logits, `(batch, n_labels)`.
    """
    student, teacher = student.float(), teacher.float()
    yes = torch.sigmoid(teacher)
    gap_yes = F.logsigmoid(teacher) - F.logsigmoid(student)
    gap_no = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return (yes * gap_yes + (1 - yes) * gap_no).sum()
