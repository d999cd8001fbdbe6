import json
import logging

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback, TrainerState

from hf_slim import PruningCallback, PruningConfig, SlimError
from hf_slim.pruning.transform import plan_pruning
from tests import tiny


class Watch(TrainerCallback):
    """Notes how many neurons of the first layer are zero after each step."""

    def __init__(self):
        self.zeros = []

    def on_step_end(self, args, state, control, model, **kwargs):
        mlp = model.model.layers[0].mlp
        alive = mlp.up_proj.weight.any(dim=1) | mlp.gate_proj.weight.any(dim=1) | mlp.down_proj.weight.any(dim=0)
        self.zeros.append(int((~alive).sum()))


def test_groups_go_gradually_and_stay_away(tmp_path):
    watch = Watch()
    config = PruningConfig(sparsity={"ffn": 0.5}, start=0.0, stop=0.6)
    tiny.trainer(tiny.llama(), tmp_path, [PruningCallback(config), watch], max_steps=10).train()
    assert watch.zeros == sorted(watch.zeros)
    assert 0 < watch.zeros[0] < watch.zeros[3]
    assert watch.zeros[5:] == [32] * 5


def test_groups_that_become_important_again_come_back_and_are_trained(tmp_path, monkeypatch):
    """In the first half of pruning the upper neurons score highest, in the second half the lower ones."""
    masks, columns = [], {}

    def scores(model, group_sets, criteria, seen):
        ranks = lambda count: torch.arange(count).float() if len(masks) < 4 else -100 - torch.arange(count).float()  # noqa: E731
        return {found.name: ranks(found.count) for found in group_sets}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            masks.append([list(indices) for indices in callback.run.removed.values()])
            down = model.model.layers[0].mlp.down_proj.weight.detach()
            columns[len(masks)] = down.clone()

    monkeypatch.setattr("hf_slim.pruning.callback.score_all", scores)
    monkeypatch.setattr("hf_slim.pruning.importance.scores.SCORE_MEMORY", 0.0)
    config = PruningConfig({"ffn": 0.5}, regrow=True, criterion="l1", start=0.0, stop=0.8, every=1)
    callback = PruningCallback(config)
    trainer = tiny.trainer(tiny.llama(), tmp_path, [callback, Watch()], max_steps=10)
    trainer.train()
    early, late = set(masks[3][0]), set(masks[-1][0])
    assert early == set(range(len(early)))
    assert len(early) > 0
    assert late == set(range(32, 64))
    back = sorted(early - late)
    assert not columns[4][:, back].any()  # silenced
    assert columns[10][:, back].any(dim=0).all()  # trained again
    assert not columns[10][:, sorted(late)].any()
    assert [layer.mlp.up_proj.out_features for layer in trainer.model.model.layers] == [32, 32, 32]
    assert torch.equal(trainer.model.model.layers[0].mlp.down_proj.weight, columns[10][:, :32])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("criterion", ["taylor", "taylor_sum", "fisher", "fisher_mask", "movement"])
def test_a_step_with_an_overflow_does_not_change_the_scores(criterion, value, tmp_path, caplog):
    """A gradient scaler skips such a step, but callbacks still see its gradients."""
    scores = {}

    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                mlp = model.model.layers[0].mlp
                mlp.up_proj.weight.grad[5, 2] = mlp.down_proj.weight.grad[2, 5] = value

    class Skip(TrainerCallback):
        """Comes after pruning, and keeps the optimizer from the weights as the scaler does."""

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                model.zero_grad()

    callback = PruningCallback(PruningConfig({"ffn": 0.5}, criterion=criterion, start=0.3))
    trainer = tiny.trainer(tiny.llama(), tmp_path, [Overflow(), callback, Skip()])
    trainer.add_callback(tiny.EveryStep(lambda model: scores.update(callback.run.scores)))
    trainer.train()
    assert "uses none of this step's scores" in caplog.text
    assert scores
    assert all(torch.isfinite(score).all() for score in scores.values())
    assert [layer.mlp.up_proj.out_features for layer in trainer.model.model.layers] == [32, 32, 32]


def test_staged_pruning_leaves_steps_to_recover_between_equal_jumps(tmp_path):
    watch = Watch()
    config = PruningConfig({"ffn": 0.75}, schedule="staged", rounds=3, start=0.1, stop=0.9)
    tiny.trainer(tiny.llama(), tmp_path, [PruningCallback(config), watch], max_steps=10).train()
    assert watch.zeros == [0, *[16] * 3, *[32] * 4, *[48] * 2]


def test_uniform_neurons_give_an_ordinary_checkpoint(tmp_path):
    for family, auto in (("llama", AutoModelForCausalLM), ("bert", AutoModelForSequenceClassification)):
        callback = PruningCallback({"sparsity": {"ffn": 0.25}})
        trainer = tiny.trainer(tiny.FAMILIES[family](), tmp_path / family, [callback])
        trainer.train()
        trainer.save_model(str(tmp_path / family / "small"))
        config = json.loads((tmp_path / family / "small" / "config.json").read_text())
        assert config["intermediate_size"] == 48
        assert "quantization_config" not in config
        loaded = auto.from_pretrained(tmp_path / family / "small")
        assert torch.equal(tiny.logits(loaded), tiny.logits(trainer.model))


def test_uniform_heads_give_an_ordinary_llama_and_a_slim_bert(tmp_path):
    config = PruningConfig(sparsity={"kv_heads": 0.34})
    for family, plain in (("llama", True), ("bert", False)):
        trainer = tiny.trainer(tiny.FAMILIES[family](), tmp_path / family, [PruningCallback(config)])
        trainer.train()
        assert hasattr(trainer.model.config, "quantization_config") != plain
    assert trainer.model.bert.encoder.layer[0].attention.self.num_attention_heads == 3


def test_a_run_that_stops_early_says_that_it_fell_short(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    with caplog.at_level(logging.WARNING):
        tiny.trainer(tiny.llama(), tmp_path, [PruningCallback(PruningConfig(start=0.0)), Stop()]).train()
    assert "short of its target" in caplog.text


def test_two_callbacks_of_the_kind_are_refused(tmp_path):
    with pytest.raises(SlimError, match="one config per technique"):
        tiny.trainer(tiny.llama(), tmp_path, [PruningCallback(), PruningCallback({"sparsity": 0.25})])


def test_a_checkpoint_of_an_ordinary_run_can_be_resumed_with_pruning(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    tiny.trainer(tiny.llama(), tmp_path, [], **settings).train()
    model = tiny.llama()
    again = tiny.trainer(model, tmp_path, [PruningCallback(PruningConfig(start=0.0, stop=1.0))], **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert model.model.layers[0].mlp.up_proj.out_features == 32


class Pictures(nn.Module):
    """A network that is no Transformers model."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, pixels, labels=None):
        maps = self.second(self.first(pixels).relu()).relu()
        logits = self.out(self.hidden(maps.mean((2, 3))).relu())
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def test_a_module_of_ones_own_is_pruned_once_it_says_what_it_reads(tmp_path):
    pixels = torch.rand(16, 1, 8, 8)
    data = Dataset.from_dict({"pixels": pixels.tolist(), "labels": [i % 3 for i in range(16)]})
    config = PruningConfig({"channels": 0.5, "ffn": 0.25}, start=0.0)
    model = Pictures()
    with pytest.raises(SlimError, match=r"model\.dummy_inputs ="):
        tiny.trainer(model, tmp_path, [PruningCallback(config)], data)
    model.dummy_inputs = {"pixels": pixels[:1]}
    tiny.trainer(model, tmp_path, [PruningCallback(config)], data).train()
    assert [tuple(layer.weight.shape[:2]) for layer in (model.first, model.second)] == [(4, 1), (4, 4)]
    assert (model.hidden.weight.shape, model.out.in_features) == ((12, 4), 12)
    assert model(pixels)["logits"].shape == (16, 3)


@pytest.mark.parametrize(("steps", "scored"), [(20, 10), (64, 32), (160, 40), (10_000, 625)])
def test_long_runs_do_not_score_in_every_step(steps, scored, monkeypatch):
    counted = []
    monkeypatch.setattr("hf_slim.pruning.callback.score_all", lambda *given: counted.append(1) or {})
    callback = PruningCallback(PruningConfig(stop=0.5))
    callback.run.plan = plan_pruning(tiny.llama(), callback.config)
    for step in range(steps):
        state = TrainerState(max_steps=steps, global_step=step)
        callback.on_step_begin(None, state, None)
        callback.on_pre_optimizer_step(None, state, None, model=nn.Module())
    assert len(counted) == scored
