import pytest
import torch

from hf_slim import DistillationConfig, SlimError
from hf_slim.distillation.losses.predictions import LogitPredictions
from hf_slim.distillation.objective import Student, objective_of
from hf_slim.distillation.targets import Targets


def predictions(logits):
    return LogitPredictions(logits.flatten(0, -2), None, logits.shape[-1])


def test_a_shifted_position_predicts_the_next_label():
    labels = torch.tensor([[-100, 5, -100, 7], [1, 2, 3, -100]])
    assert Targets(labels, shifted=True).rows().places.tolist() == [0, 2, 4, 5]
    assert Targets(labels, shifted=False).rows().places.tolist() == [1, 3, 4, 5, 6]


@pytest.mark.parametrize("computes_task", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (6, 5, 3)])
def test_micro_batches_add_up_to_the_whole_batch(shape, computes_task):
    student, teacher = torch.randn(shape), torch.randn(shape)
    labels = torch.randint(0, 3, shape[:-1])
    if labels.dim() == 2:
        labels[0, :4] = -100
    items = (labels != -100).sum()

    def objective(rows):
        counted = labels[rows].reshape(-1) != -100
        logits = student[rows].flatten(0, -2)[counted]
        reduction = "mean" if student.dim() == 2 else "sum"  # as the models of transformers do it
        task = torch.nn.functional.cross_entropy(logits, labels[rows].reshape(-1)[counted], reduction=reduction)
        task = None if computes_task else task if student.dim() == 2 else task / items
        made = Student(student[rows], None, 3, task, sums={"hidden": (0.5, student[rows].square().sum())})
        config = DistillationConfig(temperature=2.0, losses={"forward_kl": 1.0, "reverse_kl": 0.5})
        targets = Targets(labels[rows], shifted=False, items_in_batch=items)
        return objective_of(made, predictions(teacher[rows]), targets, config, 0.4, computes_task)

    parts = [objective(rows) for rows in torch.arange(6).split([1, 3, 2])]
    whole = objective(torch.arange(6))
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    for name, value in whole.parts.items():
        torch.testing.assert_close(sum(part.parts[name] for part in parts), value)
    mixed = 0.6 * whole.parts["task"] + 0.4 * whole.parts["distillation"]
    torch.testing.assert_close(mixed, whole.total)


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0), 5])
@pytest.mark.parametrize("has_own_task", [True, False])
def test_a_batch_without_any_label_adds_nothing(has_own_task, items):
    logits, labels = torch.randn(2, 4, 3, requires_grad=True), torch.full((2, 4), -100)
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) if has_own_task else None
    weights = Targets(labels, shifted=False).weights_over(torch.ones_like(labels))
    sums = {"hidden": (0.5, (logits.square().sum(-1) * weights).sum())}
    student = Student(logits, None, 3, own, sums=sums)
    targets = Targets(labels, shifted=False, items_in_batch=items)
    found = objective_of(
        student, predictions(torch.randn(2, 4, 3)), targets, DistillationConfig(), 0.5, not has_own_task
    )
    found.total.backward()
    assert found.total == 0
    assert not logits.grad.any()  # which NaN would be


def test_the_weights_of_an_examples_tokens_sum_to_its_predictions():
    labels, mask = torch.tensor([[4, 4, -100, -100], [4, 4, 4, 4]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    weights = Targets(labels, shifted=True).weights_over(mask)
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 3.0]))
    assert weights[0, 3] == 0


def test_a_teacher_with_another_vocabulary_is_refused():
    targets = Targets(torch.zeros(2, dtype=torch.long), shifted=False)
    with pytest.raises(SlimError, match="must have the same vocabulary"):
        objective_of(
            Student(torch.zeros(2, 3), None, 3),
            predictions(torch.zeros(2, 4)),
            targets,
            DistillationConfig(),
            0.5,
            False,
        )
