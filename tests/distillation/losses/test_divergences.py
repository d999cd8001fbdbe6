import pytest
import torch

from hf_slim import SlimError
from hf_slim.distillation.losses.divergences import DIVERGENCES, Distribution, over_buckets, top_k_of


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


# written as in the papers, for autograd
FORMULAS = {
    "forward_kl": lambda q, p, _: kl(p, q),
    "reverse_kl": lambda q, p, _: kl(q, p),
    "jensen_shannon": lambda q, p, b: b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q),
    "skewed_kl": lambda q, p, s: kl(p, s * p + (1 - s) * q),
    "skewed_reverse_kl": lambda q, p, s: kl(q, s * q + (1 - s) * p),
    "total_variation": lambda q, p, _: (q - p).abs().sum(-1) / 2,
    "universal": lambda q, p, _: (q.sort(-1).values - p.sort(-1).values).abs().sum(-1),
}


def logits(classes: int = 19, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    made = torch.randn(7, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made.mul(3).to(dtype)


def distribution(*arguments, **settings) -> Distribution:
    return Distribution.of_logits(logits(*arguments, **settings), 1.0)


def buckets(probabilities, ids):
    kept = probabilities.gather(-1, ids)
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)


def test_every_divergence_has_a_formula():
    assert set(FORMULAS) == set(DIVERGENCES)


@pytest.mark.parametrize("parameter", [0.1, 0.7])
@pytest.mark.parametrize("k", [None, 1, 5])
@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient_agree_with_autograd_of_the_formula(name, k, parameter):
    student = logits().requires_grad_()
    q, p = student.softmax(-1), logits(seed=1).softmax(-1)
    ours, theirs = distribution(), distribution(seed=1)
    if k:
        teacher = top_k_of(theirs, k)
        expected = FORMULAS[name](buckets(q, teacher.ids), buckets(p, teacher.ids), parameter)
        value, gradient = over_buckets(DIVERGENCES[name], ours, teacher, parameter)
    else:
        expected = FORMULAS[name](q, p, parameter)
        value, gradient = DIVERGENCES[name](ours, theirs, parameter)
    expected.sum().backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, student.grad)


@pytest.mark.parametrize("name", FORMULAS)
def test_equal_distributions_have_zero_loss_and_zero_gradient(name):
    value, gradient = DIVERGENCES[name](*(distribution(dtype=torch.float32) for _ in range(2)), 0.3)
    assert value.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", FORMULAS)
def test_all_classes_as_top_k_are_the_whole_distribution(name):
    q, p = distribution(), distribution(seed=1)
    cut = over_buckets(DIVERGENCES[name], q, top_k_of(p, 100), 0.3)
    torch.testing.assert_close(cut, DIVERGENCES[name](q, p, 0.3))


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_distributions_are_not_changed(name, k):
    q, p = distribution(), distribution(seed=1)
    before = [tensor.clone() for one in (q, p) for tensor in (one.log, one.probabilities)]
    if k:
        over_buckets(DIVERGENCES[name], q, top_k_of(p, k), 0.3)
    else:
        DIVERGENCES[name](q, p, 0.3)
    torch.testing.assert_close([q.log, q.probabilities, p.log, p.probabilities], before, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMULAS)
def test_certain_and_opposite_distributions_have_a_finite_loss(name):
    student = torch.tensor([[200.0, -200.0, 0.0], [0.0, 90.0, -90.0]])
    q, p = (Distribution.of_logits(each, 1.0) for each in (student, student.flip(-1)))
    value, gradient = DIVERGENCES[name](q, p, 0.5)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("classes", [11, 40])
def test_universal_needs_no_common_vocabulary(classes):
    student, teacher = logits().requires_grad_(), logits(classes, seed=1)
    q, p = student.softmax(-1), teacher.softmax(-1)
    width = max(q.shape[-1], classes)
    filled = [torch.nn.functional.pad(x.sort(-1, descending=True).values, (0, width - x.shape[-1])) for x in (q, p)]
    expected = (filled[0] - filled[1]).abs().sum(-1)
    expected.sum().backward()
    value, gradient = DIVERGENCES["universal"](distribution(), distribution(classes, seed=1), 0.0)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, student.grad)


def test_a_misspelt_loss_is_named():
    with pytest.raises(SlimError, match="reverse_kl"):
        DIVERGENCES["reverse_k"]
