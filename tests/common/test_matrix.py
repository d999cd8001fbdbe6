"""What every technique must keep, alone and all together: names, save and reload, resume equals uninterrupted."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_slim import (
    DistillationCallback,
    PruningCallback,
    QuantizationCallback,
    QuantizationConfig,
    SlimError,
)
from tests import tiny

TECHNIQUES = {
    "pruning": lambda: [PruningCallback(tiny.PRUNING)],
    "quantization": lambda: [QuantizationCallback(tiny.QUANTIZATION)],
    "distillation": lambda: [DistillationCallback(tiny.DISTILLATION)],
    # on purpose not in the order in which they work
    "all": lambda: [
        QuantizationCallback(tiny.QUANTIZATION),
        PruningCallback(tiny.PRUNING),
        DistillationCallback(tiny.DISTILLATION),
    ],
    "all, 4-bit groups": lambda: [
        PruningCallback(tiny.PRUNING),
        QuantizationCallback(QuantizationConfig("w4a16", group_size=16)),
        DistillationCallback(tiny.DISTILLATION),
    ],
}
FAMILIES = {"llama": AutoModelForCausalLM, "qwen3": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification}


@pytest.fixture(params=list(TECHNIQUES))
def technique(request):
    return request.param


@pytest.mark.parametrize("family", list(FAMILIES))
def test_one_added_line_trains_saves_and_reloads(family, technique, tmp_path):
    model = tiny.FAMILIES[family]()
    trainer = tiny.trainer(model, tmp_path / "run", TECHNIQUES[technique]())
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    loaded = FAMILIES[family].from_pretrained(tmp_path / "small")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    before = sum(parameter.numel() for parameter in tiny.FAMILIES[family]().parameters())
    after = sum(parameter.numel() for parameter in loaded.parameters())
    assert (after < before) == ("all" in technique or technique == "pruning")
    # a second generation of saving changes nothing either
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    first = load_file(tmp_path / "small" / "model.safetensors")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_training_keeps_parameter_names(technique, tmp_path):
    model = tiny.llama()
    names = [name for name, _ in model.named_parameters()]
    tiny.trainer(model, tmp_path, TECHNIQUES[technique]())
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("restore", [False, True])
def test_an_interrupted_run_equals_an_uninterrupted_one(technique, restore, tmp_path):
    settings = {
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "restore_callback_states_from_checkpoint": restore,
    }
    whole = tiny.llama()
    tiny.trainer(whole, tmp_path / "whole", TECHNIQUES[technique](), **settings).train()

    class Killed(Exception):
        pass

    def kill(args, state, control, **kwargs):
        if state.global_step == 4:
            raise Killed

    first = tiny.trainer(tiny.llama(), tmp_path / "broken", TECHNIQUES[technique](), **settings)
    first.callback_handler.callbacks[-1].on_step_end = kill
    with pytest.raises(Killed):
        first.train()
    resumed = tiny.llama()
    second = tiny.trainer(resumed, tmp_path / "broken", TECHNIQUES[technique](), **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))

    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_training_checkpoints_hold_float_masters(technique, tmp_path):
    tiny.trainer(tiny.llama(), tmp_path, TECHNIQUES[technique](), save_strategy="steps", save_steps=4).train()
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == {name for name in tiny.llama().state_dict() if name != "lm_head.weight"}
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_the_best_checkpoint_is_loaded_and_converted(technique, tmp_path):
    model = tiny.llama()
    trainer = tiny.trainer(
        model, tmp_path, TECHNIQUES[technique](), save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    trainer.save_model(str(tmp_path / "small"))
    state = json.loads(Path(best, "trainer_state.json").read_text())["stateful_callbacks"]
    if "PruningCallback" in state:
        removed = state["PruningCallback"]["attributes"]["removed"]
        for index, layer in enumerate(model.model.layers):
            gone = len(removed.get(f"model.layers.{index}.mlp/ffn", []))
            assert layer.mlp.up_proj.out_features == 64 - gone
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_a_model_is_not_trained_twice_by_accident(tmp_path):
    for name in ("pruning", "quantization"):
        trainer = tiny.trainer(tiny.llama(), tmp_path, TECHNIQUES[name]())
        trainer.train()
        with pytest.raises(SlimError, match="Load the model again"):
            trainer.train()


@pytest.mark.parametrize("name", ["pruning", "quantization"])
def test_a_callback_that_came_too_late_is_refused(name, tmp_path):
    trainer = tiny.trainer(tiny.llama(), tmp_path, [])
    trainer.add_callback(TECHNIQUES[name]()[0])
    with pytest.raises(SlimError, match=re.escape("`Trainer(callbacks=[...])`")):
        trainer.train()


def test_a_second_trainer_around_the_same_model_starts_clean(technique, tmp_path):
    model = tiny.llama()
    tiny.trainer(model, tmp_path / "abandoned", TECHNIQUES[technique]())
    tiny.trainer(model, tmp_path / "used", TECHNIQUES[technique]()).train()
    fresh = tiny.llama()
    tiny.trainer(fresh, tmp_path / "fresh", TECHNIQUES[technique]()).train()
    expected, found = fresh.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_base_without_its_head_loads_too(tmp_path):
    model = tiny.llama()
    trainer = tiny.trainer(model, tmp_path, TECHNIQUES["all"]())
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    headless = AutoModel.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        expected = model.model(input_ids=tiny.tokens()).last_hidden_state
        assert torch.equal(headless(input_ids=tiny.tokens()).last_hidden_state, expected)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_early_best_checkpoint_is_converted_whatever_the_order_of_callbacks(order, tmp_path, caplog):
    callbacks = [PruningCallback(tiny.PRUNING), QuantizationCallback(tiny.QUANTIZATION)]
    scores = iter(range(100, 0, -1))  # the first evaluation is the best one
    trainer = tiny.trainer(
        tiny.llama(), tmp_path, [callbacks[i] for i in order], save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="score",
    )  # fmt: skip
    trainer.compute_metrics = lambda prediction: {"score": next(scores)}
    with caplog.at_level("WARNING"):
        trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert "short of its target" in caplog.text
    removed = callbacks[0].run.removed
    for index, layer in enumerate(trainer.model.model.layers):
        assert layer.mlp.up_proj.out_features == 64 - len(removed.get(f"model.layers.{index}.mlp/ffn", []))
        assert layer.mlp.up_proj.weight.dtype == torch.int8
