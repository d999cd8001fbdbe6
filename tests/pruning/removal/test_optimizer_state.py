import pytest
import torch

from hf_slim import PruningCallback, PruningConfig, QuantizationConfig, SlimError, convert, prepare
from hf_slim.core.record import state_of
from hf_slim.pruning.removal.mask import zero_groups_
from hf_slim.pruning.state import PruningState
from tests import tiny

CONFIG = PruningConfig({"ffn": 0.25, "kv_heads": 0.34, "layers": 0.34}, criterion="l1")


def trained(convert_after: int | None, steps: int = 4):
    """A model and its optimizer after some steps; masked, and smaller from one of them on."""
    model = prepare(tiny.llama(), CONFIG).double().train()  # Adam makes steps of gradients that are mere rounding
    state = state_of(model, PruningState)
    plan, removed = state.plan, dict(state.removed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        if step == convert_after:
            convert(model, optimizer)
            removed = {}
        optimizer.zero_grad()
        model(input_ids=tiny.tokens(seed=step), labels=tiny.tokens(seed=step)).loss.backward()
        optimizer.step()
        zero_groups_(model, plan.group_sets, removed)
    return model, optimizer


def test_an_optimizer_goes_on_with_the_smaller_model_as_it_would_have_with_the_masked_one():
    early, optimizer = trained(convert_after=2)
    late, _ = trained(convert_after=None)
    convert(late)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in early.parameters()}
    for name, parameter in early.named_parameters():
        torch.testing.assert_close(parameter, late.get_parameter(name), rtol=1e-9, atol=1e-12)


def test_the_trainer_leaves_an_optimizer_that_fits_the_smaller_model(tmp_path):
    model = tiny.llama()
    trainer = tiny.trainer(model, tmp_path, [PruningCallback(PruningConfig({"ffn": 0.5}, start=0.0))])
    trainer.train()
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in parameters} == {id(parameter) for parameter in model.parameters()}
    assert all(trainer.optimizer.state[parameter]["exp_avg"].shape == parameter.shape for parameter in parameters)


def test_an_optimizer_cannot_go_on_with_packed_weights():
    model = prepare(tiny.llama(), QuantizationConfig("w8a16"))
    with pytest.raises(SlimError, match="cannot be trained further"):
        convert(model, torch.optim.AdamW(model.parameters()))
