import pytest
import torch

from hf_slim import PruningCallback, PruningConfig, SlimError, convert, prepare
from hf_slim.pruning import transform
from hf_slim.pruning.budget.latency import measure_latency
from hf_slim.pruning.budget.plan import candidates
from hf_slim.pruning.structure.find import find_group_sets
from hf_slim.pruning.transform import plan_pruning
from tests import tiny
from tests.families import FAMILIES

CONFIG = PruningConfig(target={"latency": 0.7}, criterion="l1")


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Weights in the place of milliseconds: every copy is really run, and no other process is in the way."""

    def weights(jobs, given):
        for path, block in jobs.values():
            block(*given[path][0], **given[path][1])
        return {name: float(sum(weight.numel() for weight in block.parameters())) for name, (_, block) in jobs.items()}

    monkeypatch.setattr("hf_slim.pruning.budget.latency._times", weights)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "albert"])
def test_every_family_can_be_timed_part_by_part(family):
    model = FAMILIES[family].build()
    sets = [found for found in find_group_sets(model) if found.kind in ("ffn", "kv_heads", "channels", "layers")]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured = measure_latency(model, sets, PruningConfig())
    timed = {name for curve in measured["curves"] for name in curve["group_sets"]}
    assert timed == {found.name for found in sets}
    for curve in measured["curves"]:
        assert curve["kept"] == sorted(curve["kept"], reverse=True)
        assert curve["ms"] == sorted(curve["ms"], reverse=True)
        assert len(curve["ms"]) > 1
        assert curve["ms"][-1] < curve["ms"][0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit", "qwen2_moe"])
def test_a_target_in_time_is_met(family, uniform):
    model = FAMILIES[family].build(num_hidden_layers=3)
    before = measure_latency(model, [], CONFIG)["total_ms"]
    convert(prepare(model, PruningConfig(target={"latency": 0.7}, uniform=uniform, criterion="l1")))
    assert 0.55 < measure_latency(model, [], CONFIG)["total_ms"] / before <= 0.71


def test_layers_of_the_same_shapes_are_timed_once():
    model = tiny.llama(num_hidden_layers=5)
    curves = plan_pruning(model, CONFIG).timings["curves"]
    assert [len(curve["group_sets"]) for curve in curves] == [5, 5]


def test_a_model_without_weights_is_timed_as_if_it_had_them():
    with torch.device("meta"):
        skeleton = tiny.llama()
    assert plan_pruning(skeleton, CONFIG).timings["curves"] == plan_pruning(tiny.llama(), CONFIG).timings["curves"]


def test_a_target_that_no_removal_reaches_says_which_one_does():
    with pytest.raises(SlimError, match=r"of the latency, but at most \d+% can.*a target of at least 0\.\d+"):
        plan_pruning(tiny.llama(), PruningConfig(target={"latency": 0.1}, floor=0.5))


def test_a_resumed_run_does_not_measure_again(tmp_path, monkeypatch):
    config = PruningConfig(target={"latency": 0.7}, start=0.0, stop=0.9)
    whole = tiny.trainer(tiny.llama(), tmp_path / "a", [PruningCallback(config)], save_strategy="steps", save_steps=4)
    whole.train()
    assert whole.model.model.layers[0].mlp.up_proj.out_features < 64
    monkeypatch.setattr(transform, "measure_latency", lambda *given: pytest.fail("it measured"))
    again = tiny.trainer(tiny.llama(), tmp_path / "b", [PruningCallback(config)])
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    expected = whole.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in again.model.state_dict().items())


def test_real_time_is_taken_where_the_model_lies(monkeypatch):
    monkeypatch.undo()
    model = tiny.llama()
    measured = measure_latency(model, candidates(find_group_sets(model), CONFIG), CONFIG)
    assert all(ms > 0 for curve in measured["curves"] for ms in (measured["total_ms"], *curve["ms"]))
    assert (measured["device"], measured["dtype"]) == ("cpu", "float32")
    assert measured["inputs"]["input_ids"] == [1, 62]


def test_a_part_that_cannot_be_run_alone_is_named(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("hf_slim.pruning.budget.latency.cut_out_", lambda block, *given: block._modules.clear())
    with pytest.raises(SlimError, match=r"could not be timed separately \(.*\)\. Use a target of macs"):
        plan_pruning(tiny.llama(), CONFIG)
