"""Outputs that are no distribution over classes: numbers, and yes or no for each of several labels."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_slim.core.registry import Registry

# student's and teacher's outputs `(batch, n_outputs)` -> the sum of their distances
OUTPUT_LOSSES: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry("problem type")
# outputs and labels -> the mean that the model's own loss is
TASK_MEANS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "regression": lambda outputs, labels: F.mse_loss(outputs.reshape(labels.shape), labels),
    "multi_label_classification": lambda outputs, labels: F.binary_cross_entropy_with_logits(outputs, labels),
}


@OUTPUT_LOSSES.register("regression")
def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared difference of the predicted numbers, summed."""
    return (student.float() - teacher.float()).square().sum()


@OUTPUT_LOSSES.register("multi_label_classification")
def binary_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each label's yes and no, summed."""
    student, teacher = student.float(), teacher.float()
    yes = torch.sigmoid(teacher)
    gap_yes = F.logsigmoid(teacher) - F.logsigmoid(student)
    gap_no = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return (yes * gap_yes + (1 - yes) * gap_no).sum()
