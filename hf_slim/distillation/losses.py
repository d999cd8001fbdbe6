"""Distances between what the student and the teacher answer, summed over rows."""

import torch
from torch import Tensor

CHUNK_ROWS = 128  # rows in float32 at a time: 25 MB for a vocabulary of 49152


class _ForwardKL(torch.autograd.Function):
    # The gradient is a by-product of the loss, so both come from one pass and only the gradient is kept: one tensor
    # of the logits' size, where autograd through log_softmax and kl_div keeps three.
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, rows: Tensor, temperature: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float32 if student.dtype != torch.float64 else torch.float64)
        total = total.to(student.device)
        gradient = torch.zeros_like(student)
        for chunk in rows.split(CHUNK_ROWS):
            student_log = _log_softmax(student[chunk], temperature)
            teacher_log = _log_softmax(teacher[chunk], temperature)
            teacher_probability = teacher_log.exp()
            total += (teacher_probability * (teacher_log - student_log)).sum()
            difference = student_log.exp_().sub_(teacher_probability).div_(temperature)
            gradient[chunk] = difference.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature if temperature != 1 else wide, dim=-1)


def forward_kl_sum(student: Tensor, teacher: Tensor, rows: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over rows of `KL(teacher || student)` in nats, at a temperature and without its square.

    Args:
        student: Logits `(n_rows, n_classes)`, any float dtype; gets the gradient.
        teacher: Logits of the same shape; no gradient.
        rows: Indices of the rows that count.
        temperature: Positive; both logits are divided by it.
    Returns: a scalar, float32 (float64 for float64 logits).
    Source: Hinton et al. 2015, arXiv:1503.02531, sec. 2.
    """
    return _ForwardKL.apply(student, teacher, rows, temperature)
