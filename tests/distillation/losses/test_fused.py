import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F

from hf_slim.distillation.losses import fused
from hf_slim.distillation.losses.divergences import DIVERGENCES
from hf_slim.distillation.losses.fused import LogitLoss, Rows, Term, logit_sums
from hf_slim.distillation.losses.predictions import LogitPredictions, MixedPredictions

WIDTH, CLASSES, POSITIONS = 6, 23, 40


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def head(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, CLASSES, bias=bias, dtype=dtype)


class Capped(nn.Linear):
    """A head of its own kind, for which only autograd knows the gradient."""

    def forward(self, states):
        return 4 * torch.tanh(super().forward(states) / 4)


def some_rows(weighted: bool = False) -> Rows:
    places = torch.arange(1, POSITIONS, 2)
    weights = draw(len(places), seed=5).abs() if weighted else None
    return Rows(places, torch.arange(len(places)) % CLASSES, weights)


def naive(states, output, rows, teacher_logits, loss, mix=None):
    """Whole logits and autograd."""
    logits = (output(states) if output is not None else states)[rows.places]
    log_p = (teacher_logits[rows.places] / loss.temperature).log_softmax(-1) if mix is None else mix[rows.places]
    log_q = (logits / loss.temperature).log_softmax(-1)
    weights = 1 if rows.weights is None else rows.weights
    divergence = ((log_p.exp() * (log_p - log_q)).sum(-1) * weights).sum()
    total = loss.terms[0].weight * loss.temperature**2 * divergence
    return total + loss.task_weight * F.cross_entropy(logits, rows.labels, reduction="sum")


@pytest.fixture(
    params=[(2**25, 2**21), (4 * CLASSES * 7, 4 * CLASSES * 3)], ids=["one chunk", "many chunks and blocks"]
)
def chunks(request, monkeypatch):
    monkeypatch.setattr(fused, "CHUNK_BYTES", request.param[0])
    monkeypatch.setattr(fused, "BLOCK_BYTES", request.param[1])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("task_weight", "temperature"), [(0.4, 1.0), (0.4, 2.0), (0.0, 2.0)])
@pytest.mark.parametrize("kind", ["linear", "no bias", "own kind", "logits"])
def test_value_and_gradients_agree_with_whole_logits_in_float64(kind, task_weight, temperature, weighted, chunks):
    torch.manual_seed(0)
    made = {"linear": head(), "no bias": head(bias=False), "logits": None}
    output = made[kind] if kind in made else Capped(WIDTH, CLASSES, dtype=torch.float64)
    states, teacher = draw(POSITIONS, WIDTH if output is not None else CLASSES), draw(POSITIONS, CLASSES, seed=1)
    loss = LogitLoss(task_weight, [Term(DIVERGENCES["forward_kl"], 0.0, 0.6)], temperature)
    results = []
    for compute in ("naive", "fused"):
        leaf = states.clone().requires_grad_()
        if compute == "naive":
            total = naive(leaf, output, some_rows(weighted), teacher, loss)
        else:
            answers = LogitPredictions(teacher, None, CLASSES)
            total = logit_sums(leaf, output, some_rows(weighted), answers, loss, CLASSES).total
        (total * 0.3).backward()
        parameters = [] if output is None else list(output.parameters())
        results.append([total, leaf.grad, *(p.grad for p in parameters)])
        for parameter in parameters:
            parameter.grad = None
    torch.testing.assert_close(results[1], results[0])


def test_an_adapted_head_trains_its_adapters_alone(chunks):
    torch.manual_seed(0)
    base = head().requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    output = inject_adapter_in_model(config, nn.Sequential(base))[0].double()
    states, teacher = draw(POSITIONS, WIDTH), draw(POSITIONS, CLASSES, seed=1)
    loss = LogitLoss(0.5, [Term(DIVERGENCES["forward_kl"], 0.0, 0.5)])
    naive(states, output, some_rows(), teacher, loss).backward()
    expected = {name: p.grad.clone() for name, p in output.named_parameters() if p.requires_grad}
    output.zero_grad()
    logit_sums(states, output, some_rows(), LogitPredictions(teacher, None, CLASSES), loss, CLASSES).total.backward()
    for name, parameter in output.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])
    assert base.weight.grad is None


def test_several_teachers_are_the_mean_of_their_probabilities():
    states, teachers = draw(POSITIONS, CLASSES), [draw(POSITIONS, CLASSES, seed=seed) for seed in (1, 2)]
    loss = LogitLoss(0.0, [Term(DIVERGENCES["forward_kl"], 0.0, 1.0)], 2.0)
    mixed = MixedPredictions([LogitPredictions(teacher, None, CLASSES) for teacher in teachers], [0.25, 0.75])
    mean = (0.25 * (teachers[0] / 2).softmax(-1) + 0.75 * (teachers[1] / 2).softmax(-1)).log()
    expected = naive(states, None, some_rows(), None, loss, mix=mean)
    torch.testing.assert_close(logit_sums(states, None, some_rows(), mixed, loss, CLASSES).total, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_stays_within_its_rounding(autocast):
    output, dtype = head(dtype=torch.float32), torch.float32 if autocast else torch.bfloat16
    states, teacher = draw(POSITIONS, WIDTH), draw(POSITIONS, CLASSES, seed=1)
    loss = LogitLoss(0.5, [Term(DIVERGENCES["forward_kl"], 0.0, 0.5)])
    leaf = states.clone().requires_grad_()
    exact = naive(leaf, output.double(), some_rows(), teacher, loss)
    exact.backward()
    narrow = states.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = logit_sums(
            narrow, output.to(dtype), some_rows(), LogitPredictions(teacher.to(dtype), None, CLASSES), loss, CLASSES
        ).total
    found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=0)
    assert (narrow.grad.double() - leaf.grad).norm() < 0.02 * leaf.grad.norm()


def test_a_second_backward_pass_is_an_error_not_a_wrong_gradient():
    states = draw(POSITIONS, CLASSES).requires_grad_()
    loss = LogitLoss(1.0, [])
    total = logit_sums(states, None, some_rows(), None, loss, CLASSES).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Run forward again"):
        total.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_autocast_does_not_round_the_divergence(name, dtype):
    logits, teacher = (
        draw(POSITIONS, CLASSES, dtype=torch.float32),
        draw(POSITIONS, CLASSES, seed=1, dtype=torch.float32),
    )
    loss = LogitLoss(0.0, [Term(DIVERGENCES[name], 0.3, 1.0)], 1.0, None)
    rows, found = Rows(torch.arange(POSITIONS), torch.zeros(POSITIONS, dtype=torch.long)), []
    for enabled in (False, True):
        states = logits.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            predictions = LogitPredictions(teacher, None, CLASSES)
            sums = logit_sums(states, None, rows, predictions, loss, CLASSES)
        sums.total.backward()
        found.append((sums.total.detach(), states.grad))
    for exact, under_autocast in zip(*found, strict=True):
        assert torch.equal(exact, under_autocast)


@pytest.mark.parametrize("how", ["forward hook", "forward pre-hook", "replaced forward"])
def test_a_linear_layer_that_computes_something_else_keeps_its_own_gradient(how):
    output = head()
    if how == "forward hook":
        output.register_forward_hook(lambda module, given, made: 3 * made)
    elif how == "forward pre-hook":
        output.register_forward_pre_hook(lambda module, given: (given[0] * 3,))
    else:
        own = output.forward
        output.forward = lambda states: 3 * own(states)
    found = []
    loss = LogitLoss(0.4, [Term(DIVERGENCES["forward_kl"], 0.0, 0.6)], 2.0, None)
    teacher, rows = draw(POSITIONS, CLASSES, seed=1), some_rows()
    for compute in (
        lambda states: logit_sums(states, output, rows, LogitPredictions(teacher, None, CLASSES), loss, CLASSES).total,
        lambda states: naive(states, output, rows, teacher, loss),
    ):
        output.zero_grad()
        states = draw(POSITIONS, WIDTH).requires_grad_()
        total = compute(states)
        total.backward()
        found.append((total.detach(), states.grad, output.weight.grad.clone()))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)
