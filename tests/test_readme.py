"""The README's Python runs as it stands, in order, on a tiny model."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_slim import DistillationCallback
from hf_slim.distillation.teachers.live import freeze_
from tests import tiny

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_five_snippets():
    assert len(SNIPPETS) == 5


def test_the_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save_base(tmp_path / "base")
    args = TrainingArguments("run", max_steps=6, use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2)
    batches = [{"input_ids": tiny.tokens(2, seed=i), "labels": tiny.tokens(2, seed=i)} for i in range(3)]
    names = {
        "model": AutoModelForCausalLM.from_pretrained("base"), "args": args,
        "data": tiny.text_data(), "batches": batches,
    }  # fmt: skip
    exec(SNIPPETS[0], names)
    trained = tiny.logits(names["model"])
    assert names["model"].model.layers[0].mlp.up_proj.out_features < 64
    exec(SNIPPETS[1], names)
    assert torch.equal(tiny.logits(names["model"]), trained)
    names["model"] = AutoModelForCausalLM.from_pretrained("base")
    exec(SNIPPETS[2], names)
    assert names["model"].lm_head.weight.dtype == torch.float32
    assert names["model"].model.layers[0].mlp.up_proj.weight.dtype == torch.int8


def test_the_snippets_of_a_teacher_run(tmp_path, monkeypatch):
    from datasets import Dataset
    from transformers import Trainer
    from trl import SFTTrainer

    monkeypatch.chdir(tmp_path)
    tiny.save_base(tmp_path / "base")
    args = TrainingArguments("run", max_steps=2, use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2)
    names = {
        "student": AutoModelForCausalLM.from_pretrained("base"), "teacher": freeze_(tiny.llama(seed=7)), "args": args,
        "data": tiny.text_data(), "Trainer": Trainer, "SFTTrainer": SFTTrainer,
        "chats": Dataset.from_dict({"prompt": ["one and "] * 8, "completion": ["two"] * 8}),
        "DistillationCallback": DistillationCallback,
    }  # fmt: skip
    before = tiny.logits(names["student"])
    for snippet in SNIPPETS[3:]:
        exec(snippet, names)
        after = tiny.logits(names["student"])
        assert not torch.equal(after, before)
        before = after


@pytest.mark.parametrize("target", ["quickstart", "test", "lint"])
def test_the_make_targets_that_the_readme_names_exist(target):
    assert f"make {target}" in README
    assert f"\n{target}:" in (Path(__file__).parents[1] / "Makefile").read_text()


def test_every_path_that_the_readme_names_exists():
    for path in set(re.findall(r"(?:recipes|hf_slim|tests)/[\w./-]+\.(?:yaml|py)", README)):
        assert (Path(__file__).parents[1] / path).is_file(), path
