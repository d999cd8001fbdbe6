import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_slim import SlimError, write_card
from hf_slim.data import load_texts
from hf_slim.evaluation.footprint import METADATA
from hf_slim.hub.card import render_card
from hf_slim.integration import saving
from hf_slim.recipe import load_recipe
from hf_slim.workflows import train
from hf_slim.workflows.stages import RunFolders
from tests import tiny

RECIPE = """\
model: {model}
output: {output}
data: {{source: {data}, block_size: 16}}
training: {{max_steps: 4, per_device_train_batch_size: 2, use_cpu: true, disable_tqdm: true, logging_steps: 2}}
distillation: {{teacher: self}}
pruning: {{sparsity: {{ffn: 0.25}}, start: 0.0}}
quantization: {{scheme: w8a8, embeddings: w8a8}}
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


@pytest.mark.slow
def test_a_recipe_ends_in_a_small_model_and_a_measured_report(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    report = train.run(recipe)
    folder = tmp_path / "out" / "small"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["small"]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.model.layers[0].mlp.up_proj.out_features == 48
    assert loaded.config.use_cache
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    assert {"report.md", "report.png", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    card = (folder / "README.md").read_text()
    assert card == render_card(json.loads((folder / "report.json").read_text()), "small", True)
    assert write_card(folder).read_text() == card
    assert report["saved"]["weights"].keys() == {"model.safetensors"}
    given = sum(path.stat().st_size for path in (tmp_path / "base").iterdir())
    assert report["sources"]["model"] == {"name": "base", "bytes": given}
    for side in ("base", "result"):
        assert report[side]["quality"]["perplexity"] > 1
        assert report[side]["memory"].keys() == {"ram_bytes", "disk_bytes", "peak_rss_bytes"}
        assert len(report[side]["inference"]["prefill_ms"]["samples"]) == 2
        assert report[side]["training"]["step_ms"]["median"] > 0
    assert report["base"]["compute"]["parameters"] == sum(p.numel() for p in tiny.llama().parameters())
    assert report["ratios"]["files on disk"] > 1
    on_disk = sum(path.stat().st_size for path in folder.iterdir() if path.name not in METADATA)
    assert report["result"]["memory"]["disk_bytes"] == on_disk

    with pytest.raises(SlimError, match=r"already holds a finished model.*--overwrite"):
        train.run(recipe)
    train.publish(tiny.llama(), tiny.tokenizer(), folder)  # what --overwrite ends in
    assert AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.out_features == 64
    assert sorted(path.name for path in folder.parent.iterdir()) == ["small"]


def test_a_save_that_is_killed_leaves_the_previous_model(recipe_file, tmp_path, monkeypatch):
    folder = tmp_path / "out" / "small"
    train.publish(tiny.llama(), tiny.tokenizer(), folder)
    before = tiny.logits(AutoModelForCausalLM.from_pretrained(folder))
    newer = tiny.llama(seed=5)

    def half_a_save(model, tokenizer, target):
        (target / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(saving, "save", half_a_save)
        with pytest.raises(KeyboardInterrupt):
            train.publish(newer, tiny.tokenizer(), folder)
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(folder)), before)
    train.publish(newer, tiny.tokenizer(), folder)  # the next run clears what the killed one left
    assert sorted(path.name for path in folder.parent.iterdir()) == ["small"]


def test_an_output_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SlimError, match="other files"):
        train.check_output(tmp_path, overwrite=True)
    with pytest.raises(SlimError, match="is a file"):
        train.check_output(tmp_path / "thesis.txt", overwrite=True)


def test_an_output_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SlimError, match="which is a file"):
        train.check_output(tmp_path / "file" / "deep" / "small", overwrite=False)
    monkeypatch.setattr("hf_slim.integration.saving.os.access", lambda path, mode: False)
    with pytest.raises(SlimError, match="is read-only"):
        train.check_output(tmp_path / "new" / "small", overwrite=False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["data.block_size=40000"], "gives fewer than 40000 tokens"),
        (["data.block_size=80"], "80 tokens, and the model has 64 positions"),
    ],
)
def test_data_that_cannot_be_measured_or_read_is_refused_before_training(
    recipe_file, tmp_path, monkeypatch, changes, says
):
    monkeypatch.setattr(train, "_run_stage", lambda *inputs: pytest.fail("trained"))
    with pytest.raises(SlimError, match=says):
        train.run(load_recipe(recipe_file, changes))


def test_a_recipe_is_never_measured_on_what_it_was_trained_on(recipe_file, tmp_path, monkeypatch):
    """Also where its only file has a name by which `hf-slim eval` would measure all of it."""
    source = (tmp_path / "data.jsonl").rename(tmp_path / "test.jsonl")
    recipe, measured = load_recipe(recipe_file, [f"data.source={source}"]), []

    def compare(task, base, result, held_out, data, settings):
        measured.extend(held_out["text"])
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_stages", lambda *inputs: train.Trained("base", [], [], [], base_is_judged=True))
    monkeypatch.setattr(train, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        train.run(recipe)
    assert measured
    assert not set(measured) & set(load_texts(recipe.data)[0]["text"])


def test_resuming_passes_over_a_checkpoint_that_was_cut_short(tmp_path, caplog):
    with pytest.raises(SlimError, match="no complete checkpoint"):
        train.last_checkpoint(tmp_path)
    for step, state in ((2, "{}"), (10, '{"global'), (9, None), (8, "{}")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    save_file({"weight": torch.ones(100)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(whole)
    (tmp_path / "checkpoint-8" / "model.safetensors").write_bytes(whole[:-9])
    with caplog.at_level(logging.WARNING):
        assert train.last_checkpoint(tmp_path).endswith("checkpoint-2")
    for step in (8, 9, 10):
        assert f"checkpoint-{step} is incomplete or damaged" in caplog.text


def test_an_interrupted_recipe_goes_on_to_the_same_model(recipe_file, tmp_path, monkeypatch):
    def recipe(name):
        changes = [f"output={tmp_path / name}", "training.save_strategy=steps", "training.save_steps=2"]
        return load_recipe(recipe_file, changes)

    def killed(*arguments):
        raise KeyboardInterrupt

    for name in ("whole", "broken"):
        (tmp_path / f"scratch-{name}").mkdir()
    train.train_stages(recipe("whole"), RunFolders(recipe("whole"), tmp_path / "scratch-whole"), resume=False)
    with monkeypatch.context() as broken:
        broken.setattr(train, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            train.train_stages(
                recipe("broken"), RunFolders(recipe("broken"), tmp_path / "scratch-broken"), resume=False
            )
    assert not (tmp_path / "broken").exists()
    shutil.rmtree(tmp_path / "broken.checkpoints" / "checkpoint-4")  # as if it had ended between steps 2 and 4
    train.train_stages(recipe("broken"), RunFolders(recipe("broken"), tmp_path / "scratch-broken"), resume=True)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
