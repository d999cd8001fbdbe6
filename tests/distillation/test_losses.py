import pytest
import torch
from torch.nn import functional as F

from hf_slim.distillation.losses import CHUNK_ROWS, forward_kl_sum


def pair(rows, classes=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, classes, generator=generator, dtype=torch.float64).mul(3).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("rows", [1, CHUNK_ROWS, 2 * CHUNK_ROWS + 7])
def test_value_and_gradient_agree_with_torch_in_float64(rows, temperature):
    student, teacher = pair(rows)
    counted = torch.arange(0, rows, 2)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = forward_kl_sum(ours, teacher, counted, temperature)
    loss.mul(0.3).backward()
    log_student = F.log_softmax(theirs[counted] / temperature, -1)
    log_teacher = F.log_softmax(teacher[counted] / temperature, -1)
    expected = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    expected.mul(0.3).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_gradient_is_the_finite_difference():
    student, teacher = pair(4)
    rows = torch.arange(4)
    assert torch.autograd.gradcheck(lambda s: forward_kl_sum(s, teacher, rows, 2.0), student.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_logits_are_compared_in_float32(dtype):
    student, teacher = pair(32, dtype=dtype)
    rows = torch.arange(32)
    expected = forward_kl_sum(student.double(), teacher.double(), rows)
    torch.testing.assert_close(forward_kl_sum(student, teacher, rows).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_student_that_answers_like_the_teacher_loses_nothing():
    student, _ = pair(8, dtype=torch.float32)
    student.requires_grad_()
    loss = forward_kl_sum(student, student.detach().clone(), torch.arange(8))
    loss.backward()
    assert loss.abs() < 1e-5
    assert student.grad.abs().max() < 1e-6
