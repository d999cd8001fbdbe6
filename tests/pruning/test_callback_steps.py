"""What the pruning callback does in a single step, against its rules written down in float64."""

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerState

from hf_slim import PruningCallback, PruningConfig
from hf_slim.pruning.budget.plan import plan_removal
from hf_slim.pruning.groups import GroupSet, Slice
from hf_slim.pruning.importance.scores import observed, score_groups
from hf_slim.pruning.transform import plan_pruning
from tests import tiny

COUNT, STEPS = 8, 10
NAME = "layer/ffn"
MEMORY = 0.9  # what the running mean keeps


class Layer(nn.Module):
    """Eight neurons: what writes them, and what reads them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, COUNT), nn.Linear(COUNT, 2)


def prepared(**settings) -> tuple[PruningCallback, Layer]:
    """A callback in the midst of a run, and its model."""
    config = PruningConfig({"ffn": 0.5}, **({"start": 0.0, "stop": 1.0, "schedule": "linear"} | settings))
    callback, model = PruningCallback(config), Layer()
    parts = (Slice("up.weight", 0, 1), Slice("up.bias", 0, 1), Slice("down.weight", 1, 1, reads=True))
    callback.run.plan = plan_removal(model, [GroupSet(NAME, "ffn", COUNT, parts)], config)
    return callback, model


def state(step: int) -> TrainerState:
    return TrainerState(max_steps=STEPS, global_step=step)


def scored(callback: PruningCallback, scores: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The running means after each of `scores`."""
    means = []
    for step, score in enumerate(scores):
        monkeypatch.setattr("hf_slim.pruning.callback.score_all", lambda *given, s=score: {NAME: s.clone()})
        callback.on_step_begin(None, state(step), None)
        callback.on_pre_optimizer_step(None, state(step), None, model=Layer())
        means.append(callback.run.scores[NAME].clone())
    return means


def draw(count: int = 4) -> list[Tensor]:
    return [torch.rand(COUNT, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


@pytest.mark.parametrize("removed", [[], [1, 5]])
def test_scores_are_a_running_mean_over_steps(removed, monkeypatch):
    callback, _ = prepared()
    callback.run.removed = {NAME: removed}
    expected = draw()[0].double()
    for number, found in enumerate(scored(callback, draw(), monkeypatch)):
        if number:
            expected = MEMORY * expected + (1 - MEMORY) * draw()[number].double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("removed", [[], [1, 5]])
def test_groups_that_may_come_back_keep_the_importance_that_they_had(removed, monkeypatch):
    """A group that is zero looks unimportant: its own score would never let it come back."""
    callback, _ = prepared(regrow=True)
    first, *later = draw()
    scored(callback, [first], monkeypatch)
    callback.run.removed = {NAME: removed} if removed else {}
    expected = first.double()
    for new, found in zip(later, scored(callback, later, monkeypatch), strict=True):
        moved = MEMORY * expected + (1 - MEMORY) * new.double()
        moved[removed] = expected[removed]
        expected = moved
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_step_without_scores_leaves_the_mean_alone(monkeypatch):
    callback, _ = prepared()
    monkeypatch.setattr("hf_slim.pruning.callback.SCORES_PER_RUN", 5)  # every second step
    first, second, third = draw(3)
    means = scored(callback, [first, second, third], monkeypatch)
    assert torch.equal(means[1], means[0])
    torch.testing.assert_close(means[2], MEMORY * first + (1 - MEMORY) * third)


def watching(model: nn.Module) -> PruningCallback:
    """A callback that looks at what flows through the neurons of a model."""
    callback = PruningCallback({"sparsity": {"ffn": 0.5}, "criterion": "activation", "start": 0.9, "stop": 1.0})
    callback.on_init_end(None, state(0), None, model=model)
    callback.on_train_begin(None, state(0), None, model=model)
    return callback


def test_ranks_are_summed_before_groups_are_scored(monkeypatch):
    model, events = tiny.llama().train(), []
    callback = watching(model)
    adding = lambda seen: events.append(("sum", [moments.tokens for moments in seen.values()]))  # noqa: E731
    scoring = lambda model, sets, criterion, seen: events.append("score") or {}  # noqa: E731
    monkeypatch.setattr("hf_slim.pruning.callback.summed_over_ranks_", adding)
    monkeypatch.setattr("hf_slim.pruning.callback.score_all", scoring)
    callback.on_step_begin(None, state(0), None)
    model(tiny.tokens(rows=4, length=12))
    callback.on_pre_optimizer_step(None, state(0), None, model=model)
    assert events == [("sum", [48, 48, 48]), "score"]


def test_every_score_is_of_what_has_flowed_since_the_one_before():
    model = tiny.llama().train()
    config = PruningConfig({"ffn": 0.5}, criterion="activation")
    sets, expected, expected_after = plan_pruning(model, config).group_sets, {}, []
    for step in range(3):
        with observed(model, sets, config.criterion_by_kind) as seen, torch.no_grad():
            model(tiny.tokens(seed=step))
        new = score_groups(model, sets, "activation", seen["activation"])
        expected = {name: MEMORY * expected.get(name, new[name]) + (1 - MEMORY) * new[name] for name in new}
        expected_after.append(expected)
    callback = watching(model)
    for step in range(3):
        callback.on_step_begin(None, state(step), None)
        model(tiny.tokens(seed=step))
        callback.on_pre_optimizer_step(None, state(step), None, model=model)
        torch.testing.assert_close(callback.run.scores, expected_after[step], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("every", [1, 2, 3, 4])
@pytest.mark.parametrize("stop", [0.5, 1.0])
def test_groups_go_in_the_steps_that_are_due(stop, every):
    """With `linear` a step further is a share further, rounded down; the last removal is at the stop at the latest."""
    callback, model = prepared(every=every, stop=stop)
    callback.run.scores = {NAME: torch.arange(8.0)}
    expected = 0
    for step in range(STEPS):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)  # as momentum moves what is zero
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        callback.on_optimizer_step(None, state(step), None, model=model)
        progress = (step + 1) / STEPS
        if (step + 1) % every == 0 or progress >= stop:
            expected = int(4 * min(1.0, progress / stop) + 1e-9)
        assert callback.run.removed.get(NAME, []) == list(range(expected))
        for name, parameter in model.named_parameters():
            if name != "down.bias":
                before[name].narrow(1 if name == "down.weight" else 0, 0, expected).zero_()
            assert torch.equal(parameter, before[name]), name


def test_without_scores_nothing_goes():
    callback, model = prepared()
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    callback.on_optimizer_step(None, state(9), None, model=model)
    assert callback.run.removed == {}
    assert all(torch.equal(parameter, whole[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("due", [True, False])
def test_what_may_come_back_is_silent_and_keeps_what_it_writes(due):
    """Only the layers that read a group are zeroed, in the step that masks it and in those that follow."""
    callback, model = prepared(regrow=True, every=1 if due else 100)
    callback.run.scores = {NAME: torch.arange(8.0)}
    callback.run.removed = {} if due else {NAME: [0, 1]}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    callback.on_optimizer_step(None, state(4), None, model=model)
    assert callback.run.removed == {NAME: [0, 1]}
    before["down.weight"][:, :2] = 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_group_that_comes_back_acts_again():
    callback, model = prepared(regrow=True)
    callback.run.scores, inputs = {NAME: torch.arange(8.0)}, torch.randn(5, 3)
    callback.on_optimizer_step(None, state(4), None, model=model)
    assert callback.run.removed == {NAME: [0, 1]}
    written = model.up(inputs)[:, :2]
    assert written.abs().min() > 0  # so that a gradient reaches the columns that read it
    callback.run.scores = {NAME: torch.arange(8.0).flip(0)}
    callback.on_optimizer_step(None, state(4), None, model=model)
    assert callback.run.removed == {NAME: [6, 7]}
    with torch.no_grad():
        model.down.weight.add_(1.0)
    callback.on_optimizer_step(None, state(4), None, model=model)
    assert model.down.weight[:, :6].abs().min() > 0
    assert not model.down.weight[:, 6:].any()
