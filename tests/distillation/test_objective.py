import pytest
import torch

from hf_slim import DistillationConfig, SlimError
from hf_slim.distillation.objective import Targets, mix_losses


def test_a_shifted_position_predicts_the_next_label():
    labels = torch.tensor([[-100, 5, -100, 7], [1, 2, 3, -100]])
    assert Targets(labels, shifted=True).rows().tolist() == [0, 2, 4, 5]
    assert Targets(labels, shifted=False).rows().tolist() == [1, 3, 4, 5, 6]


@pytest.mark.parametrize("shape", [(6, 3), (6, 5, 3)])
def test_micro_batches_add_up_to_the_whole_batch(shape):
    student, teacher = torch.randn(shape), torch.randn(shape)
    labels = torch.randint(0, 3, shape[:-1])
    if labels.dim() == 2:
        labels[0, :4] = -100
    items = int((labels != -100).sum())

    def objective(rows):
        counted = labels[rows].reshape(-1) != -100
        answers = student[rows].flatten(0, -2)[counted]
        reduction = "mean" if student.dim() == 2 else "sum"  # as the models of transformers do it
        task = torch.nn.functional.cross_entropy(answers, labels[rows].reshape(-1)[counted], reduction=reduction)
        task = task if student.dim() == 2 else task / items
        targets = Targets(labels[rows], shifted=False, items_in_batch=items)
        return mix_losses(task, student[rows], teacher[rows], targets, DistillationConfig(alpha=0.4, temperature=2.0))

    parts = [objective(rows) for rows in torch.arange(6).split([1, 3, 2])]
    whole = objective(torch.arange(6))
    for name in ("total", "task", "distillation"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))


def test_a_teacher_with_another_vocabulary_is_refused():
    targets = Targets(torch.zeros(2, dtype=torch.long), shifted=False)
    with pytest.raises(SlimError, match="share one vocabulary"):
        mix_losses(torch.tensor(0.0), torch.zeros(2, 3), torch.zeros(2, 4), targets, DistillationConfig())
