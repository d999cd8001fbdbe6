"""Runs that follow each other, each on the smaller model of the one before."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_slim import SlimError
from hf_slim.cli.main import main
from hf_slim.recipe import load_recipe
from hf_slim.workflows import train
from hf_slim.workflows.stages import RunFolders
from tests import tiny
from tests.workflows.test_classifier_recipe import recipe_file as classifier_file  # noqa: F401  a fixture

RECIPE = """\
model: {model}
output: {output}
data: {{source: {data}, block_size: 16}}
training: {{max_steps: 3, per_device_train_batch_size: 2, use_cpu: true, bf16: true, disable_tqdm: true,
           logging_steps: 1}}
stages:
  - pruning: {{sparsity: {{kv_heads: 0.34}}, start: 0.0}}
  - distillation: {{teacher: self}}
    pruning: {{sparsity: {{ffn: 0.5}}, uniform: false, start: 0.0}}
  - quantization: {{scheme: w8a16}}
evaluation: {{blocks: 2, prefill_tokens: 16, decode_tokens: 3, repeats: 2, training_repeats: 2, prompt: "abc"}}
"""


@pytest.fixture
def recipe_file(tmp_path):
    tiny.save_base(tmp_path / "base")
    texts = [json.dumps({"text": f"document {i}\nthe quick brown fox jumps over {i} dogs. " * 4}) for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(texts))
    path = tmp_path / "recipe.yaml"
    values = {"model": tmp_path / "base", "output": tmp_path / "out" / "small", "data": tmp_path / "data.jsonl"}
    path.write_text(RECIPE.format(**values))
    return path


def trained(recipe, scratch, resume=False):
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return train.train_stages(recipe, RunFolders(recipe, scratch), resume)


def test_each_stage_starts_from_the_model_of_the_one_before(recipe_file, tmp_path):
    made = trained(load_recipe(recipe_file), tmp_path / "scratch")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "small")
    assert {layer.self_attn.k_proj.out_features for layer in small.model.layers} == {16}
    assert sum(layer.mlp.up_proj.out_features for layer in small.model.layers) == 3 * 32
    assert small.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert [entry["stage"] for entry in made.log if "loss" in entry] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert any("loss_distill" in entry for entry in made.log if entry["stage"] == 2)
    base = AutoModelForCausalLM.from_pretrained(made.base)
    assert torch.equal(tiny.logits(base), tiny.logits(tiny.llama()))


@pytest.mark.parametrize("interrupted", ["between", "within"])
def test_an_interrupted_run_goes_on_in_its_stage_to_the_same_model(recipe_file, tmp_path, monkeypatch, interrupted):
    def recipe(name):
        changes = [f"output={tmp_path / name}", "stages.3.quantization=null"]
        saving = ["training.save_strategy=steps", "training.save_steps=2"]
        precision = ["stages.2.training.bf16=false"]  # each stage in its own
        return load_recipe(recipe_file, changes + (saving if interrupted == "within" else precision))

    whole = trained(recipe("whole"), tmp_path / "scratch")
    if interrupted == "between":
        _interrupt(monkeypatch, recipe("broken"), tmp_path / "scratch", "_run_stage", at=2)
    else:
        _interrupt(monkeypatch, recipe("broken"), tmp_path / "scratch", "_release_", at=2)
        shutil.rmtree(tmp_path / "broken.checkpoints" / "stage-2" / "checkpoint-3")
    assert not (tmp_path / "broken").exists()
    resumed = trained(recipe("broken"), tmp_path / "scratch", resume=True)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    steps = [[(e["stage"], e["step"]) for e in made.log if "loss" in e] for made in (whole, resumed)]
    assert steps[0] == steps[1]


def _interrupt(monkeypatch, recipe, scratch, name, at):
    calls, original = [], getattr(train, name)

    def killed(*arguments, **keywords):
        calls.append(name)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    with monkeypatch.context() as broken:
        broken.setattr(train, name, killed)
        with pytest.raises(KeyboardInterrupt):
            trained(recipe, scratch)


def test_an_interrupted_run_is_not_forgotten_by_accident(recipe_file, tmp_path, monkeypatch):
    recipe = load_recipe(recipe_file)
    _interrupt(monkeypatch, recipe, tmp_path / "scratch", "_run_stage", at=2)
    with pytest.raises(SlimError, match=r"--resume to continue after them, or --overwrite"):
        train.run(recipe)
    folders = RunFolders(recipe, tmp_path / "scratch")
    assert folders.finished() == 1
    folders.restart(overwrite=True)
    assert folders.finished() == 0


def test_a_finished_run_leaves_nothing_but_its_model(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    trained(recipe, tmp_path / "scratch")
    folders = RunFolders(recipe, tmp_path / "scratch")
    assert folders.finished() == 2
    folders.clear()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["small"]


def test_a_dry_run_plans_every_stage_on_the_smaller_model(recipe_file, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", str(recipe_file), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    first, second, third = out.split("stage ")[1:]
    assert "24 x 48   loses 1 groups" in first
    assert "16 x 48   float" in second
    assert "64 x 48   loses 32 groups" in second
    assert "32 x 48   w8a16" in third


def test_a_later_stage_that_cannot_work_is_refused_before_the_first_trains(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_stages", lambda *arguments: pytest.fail("it trained"))
    with pytest.raises(SlimError, match="Nothing to quantize"):
        train.run(load_recipe(recipe_file, ["stages.3.quantization.ignore=['*']"]))
    with pytest.raises(SlimError, match="refused by TrainingArguments"):
        train.run(load_recipe(recipe_file, ["stages.2.training.lr_scheduler_type=sideways"]))


def test_a_classifier_is_compared_with_the_one_that_was_only_fine_tuned(classifier_file, tmp_path):  # noqa: F811
    text = classifier_file.read_text().replace("pruning: ", "stages:\n- {}\n- pruning: ")
    classifier_file.write_text(text)
    recipe = load_recipe(classifier_file)
    made = trained(recipe, tmp_path / "scratch")
    assert made.base == str(RunFolders(recipe, tmp_path).model(1))
    assert made.base_is_judged
    assert "after stage 1" in made.notes[0]
    base, small = (AutoModelForSequenceClassification.from_pretrained(p) for p in (made.base, recipe.output))
    assert [m.bert.encoder.layer[0].attention.self.query.out_features for m in (base, small)] == [32, 16]
