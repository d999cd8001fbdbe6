import pytest
import torch
from torch import nn

from hf_slim import SlimError
from hf_slim.core.running.calibration import calibrating, first_batches, first_that_fit, precision_of_run
from tests import tiny

BATCHES = [{"input_ids": tiny.tokens(seed=seed), "labels": tiny.tokens(seed=seed)} for seed in range(3)]


def in_mixed_modes(model: nn.Module) -> list[bool]:
    model.train()
    model.model.layers[1].eval()
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("with_gradient", [True, False])
def test_every_batch_runs_in_evaluation_mode_in_every_call(with_gradient):
    model = tiny.llama()
    modes, seen = in_mixed_modes(model), []
    model.register_forward_hook(lambda module, *given: seen.append((module.training, torch.is_grad_enabled())))
    with calibrating(model, BATCHES) as run_batches:
        for _ in range(2):
            assert sum(1 for _ in run_batches(with_gradient)) == 3
    assert seen == 6 * [(False, with_gradient)]
    assert [module.training for module in model.modules()] == modes
    assert all((parameter.grad is not None) == with_gradient for parameter in model.parameters())


def test_gradients_are_those_of_the_summed_losses():
    model, again = tiny.llama(), tiny.llama()
    with calibrating(model, BATCHES) as run_batches:
        list(run_batches(True))
    sum(again.eval()(**batch).loss for batch in BATCHES).backward()
    for found, expected in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("where", ["model", "caller"])
def test_an_error_leaves_every_mode_as_it_was(where):
    model = tiny.llama()
    modes = in_mixed_modes(model)
    broken = {"input_ids": torch.full((1, 3), 10**6)}

    def calibrate():
        with calibrating(model, [BATCHES[0], broken]) as run_batches:
            for _ in run_batches():
                if where == "caller":
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError if where == "caller" else IndexError):
        calibrate()
    assert [module.training for module in model.modules()] == modes


def test_precision_is_that_of_the_run():
    seen = []
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for precision in (precision_of_run(bf16=True, fp16=False), precision_of_run(bf16=False, fp16=False)):
        with calibrating(layer, [{"input": torch.rand(2, 4)}], precision) as run:
            list(run())
    assert seen == [torch.bfloat16, torch.float32]
    assert precision_of_run(bf16=False, fp16=True) is torch.float16


def test_what_gives_no_loss_says_what_is_missing():
    with (
        pytest.raises(SlimError, match=r"needs a loss.*must hold `labels`"),
        calibrating(tiny.llama(), [{"input_ids": tiny.tokens()}]) as run,
    ):
        list(run(with_gradient=True))


def test_batches_of_a_data_loader_are_reduced_to_the_tensors_of_a_forward_pass():
    loader = ({"x": torch.tensor(i), "text": "a", "num_items_in_batch": torch.tensor(9)} for i in range(9))
    assert first_batches(loader, 2) == [{"x": torch.tensor(0)}, {"x": torch.tensor(1)}]
    assert next(loader)["x"] == 2
    assert first_batches(None, 2) == []


def test_rounds_serve_as_many_as_fit_and_at_least_one():
    sizes = {"a": 5, "b": 3, "c": 2, "d": 1}
    assert first_that_fit(sizes, 8) == ["a", "b"]
    assert first_that_fit(sizes, 10) == ["a", "b", "c"]
    assert first_that_fit(sizes, 1) == ["a"]
    assert first_that_fit({}, 1) == []
