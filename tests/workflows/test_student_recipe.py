"""Recipes whose runs train a part of the model while the whole teaches."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_slim import DistillationConfig, PruningConfig
from hf_slim.integration.techniques import callbacks_for
from hf_slim.recipe import load_recipe
from hf_slim.workflows import train
from hf_slim.workflows.plan import describe_recipe
from tests import tiny

RECIPE = """\
model: {model}
output: {output}
data: {{source: {data}, block_size: 16}}
training: {{max_steps: 2, per_device_train_batch_size: 2, use_cpu: true, logging_steps: 1, disable_tqdm: true}}
evaluation: {{blocks: 2, prefill_tokens: 8, decode_tokens: 2, repeats: 1, training_repeats: 1, prompt: "abc"}}
stages:
  - training: {{learning_rate: 0.001}}
  - student: {{layers: [0, 2]}}
    distillation: {{teacher: self, hidden: {{loss: mse}}}}
"""


@pytest.fixture
def recipe(tmp_path):
    tiny.save_base(tmp_path / "base")
    texts = [json.dumps({"text": f"document {i}\nthe quick brown fox jumps over {i} dogs. " * 4}) for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(texts))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        RECIPE.format(model=tmp_path / "base", output=tmp_path / "out" / "small", data=tmp_path / "data.jsonl")
    )
    return load_recipe(path)


@pytest.mark.slow
def test_the_whole_model_teaches_a_part_of_itself(recipe, tmp_path):
    report = train.run(recipe)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "small")
    assert small.config.num_hidden_layers == len(small.model.layers) == 2
    assert not any("projection" in name for name in small.state_dict())
    losses = [entry for entry in report["training_log"] if entry.get("stage") == 2 and "loss_hidden" in entry]
    assert len(losses) == 2
    assert report["ratios"]["parameters"] > 1
    assert report["result"]["training"]["step_ms"]["median"] > 0


def test_a_dry_run_shows_the_student(recipe):
    plan = describe_recipe(recipe)
    assert "stage 2 of 2\nstudent " in plan
    assert plan.count("techniques  distillation") == 1


def test_a_recipe_with_a_student_says_so_in_its_report(recipe):
    assert recipe.to_dict()["stages"][1]["student"]["layers"] == [0, 2]
    assert recipe.runs[0].student is None


def test_the_teacher_self_of_a_student_is_the_whole_model():
    whole = tiny.llama()
    callbacks = callbacks_for([PruningConfig(), DistillationConfig()], whole)
    assert callbacks[0].given == [whole]
    assert not whole.training
    assert not any(parameter.requires_grad for parameter in whole.parameters())
    assert callbacks_for([DistillationConfig(teacher="other/model")], whole)[0].given == []


def test_data_says_which_layers_stay(recipe, tmp_path):
    text = (tmp_path / "recipe.yaml").read_text()
    for shape, has_data in (("{layers: [0, 2]}", False), ("{keep: 0.5, choose: importance}", True)):
        (tmp_path / "recipe.yaml").write_text(text.replace("{layers: [0, 2]}", shape))
        model = tiny.llama()
        stage = load_recipe(tmp_path / "recipe.yaml").runs[1]
        batches = train.importance_batches(stage, model, tiny.tokenizer())
        assert bool(batches) == has_data
    assert torch.equal(batches[0]["input_ids"], batches[0]["labels"])
