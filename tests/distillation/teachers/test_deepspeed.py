"""Under DeepSpeed a student learns what it learns alone; stage 3 of ZeRO partitions its teacher too."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_slim import DistillationCallback
from hf_slim.distillation.teachers.live import freeze_
from hf_slim.distillation.teachers.sharding import gathered
from tests import tiny
from tests.distillation.gradients import SETTINGS, error, padded_text
from tests.distillation.processes import in_processes, place
from tests.distillation.test_gradients import WIDE, lora, lora_head
from tests.distillation.test_two_processes import EVERYTHING

# a stage, a student, whether another model teaches it, and how
RUNS = {
    "stage 2": (2, tiny.llama, True, {"temperature": 2.0}),
    "stage 3": (3, tiny.llama, True, {"temperature": 2.0}),
    "stage 3, everything, tied": (3, lambda: tiny.llama(tie_word_embeddings=True), True, EVERYTHING),
    "stage 3, without its adapters": (3, lora, False, {"temperature": 2.0}),
    "stage 3, without adapters of the head": (3, lora_head, False, {"temperature": 2.0}),
}


def save_weights(folder: str) -> None:
    """What one of one or two processes runs: weights after three steps, minus those before."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    found = {}
    for name, (stage, student, has_teacher, config) in RUNS.items():
        teacher = freeze_(tiny.llama(seed=7, **WIDE)) if has_teacher else None
        found[name] = learned(folder, student(), DistillationCallback(config, teacher), stage)
    found["stage 3, loaded in parts, a copy of itself"] = learned(folder, None, DistillationCallback(EVERYTHING), 3)
    if place()[1] == 0:
        torch.save(found, Path(folder) / "found.pt")


def learned(
    folder: str, model: torch.nn.Module | None, callback: DistillationCallback, stage: int
) -> dict[str, Tensor]:
    """By how much three steps change every weight of `model`; None: of one that is loaded once the run is set up."""
    size, _ = place()
    more = {
        "max_steps": 3,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8 // size,
    }
    if size > 1:
        more |= {"deepspeed": deepspeed(stage), "ddp_backend": "gloo"}
    args = TrainingArguments(folder, **(SETTINGS | more))
    model = model or AutoModelForCausalLM.from_pretrained(Path(folder).parent / "model")
    before = weights(model)
    Trainer(model, args, train_dataset=padded_text(), callbacks=[callback]).train()
    if size > 1 and stage == 3:
        assert all(p.numel() == 0 < p.ds_tensor.numel() < p.ds_numel for p in callback.teacher.parameters())
    return {name: value - before[name] for name, value in weights(model).items()}


def deepspeed(stage: int) -> dict:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True} | dict.fromkeys(names, "auto")


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    with gathered(model.parameters()):
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_processes_learn_what_one_learns(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    one, two = (in_processes(save_weights, tmp_path / str(count), count) for count in (1, 2))
    assert one.keys() == two.keys()
    errors = {name: error(two[name], change) for name, change in one.items()}
    assert max(errors.values()) < 1e-3, errors  # a change is a small difference of two rounded weights
