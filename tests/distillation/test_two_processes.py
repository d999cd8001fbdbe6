"""Two processes compute the gradient of one: under DDP through the Trainer, and under FSDP2 with a sharded teacher."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_slim import DistillationCallback, SlimError
from hf_slim.distillation.teachers.live import freeze_
from tests import tiny
from tests.distillation.gradients import ROWS, SETTINGS, error, padded_text
from tests.distillation.processes import in_processes, place
from tests.distillation.test_gradients import (
    CLASSES,
    HIDDEN,
    LLAMA,
    SFT,
    TRAINERS,
    WIDE,
    completions,
    lora,
    lora_head,
)  # fmt: skip

RUNS = {
    "answers and task": LLAMA.but(config={"temperature": 2.0}),
    "projections": HIDDEN["mse, projected"],
    "label smoothing": TRAINERS["label smoothing"],
    "own loss": TRAINERS["own loss"],
    "classes": CLASSES,
    # every row with an answer: the same 8 rows whatever the number of processes
    "SFTTrainer": SFT.but(data=lambda: completions(tiny.text_data(ROWS, ragged=True))),
}
EVERYTHING = {"temperature": 2.0, "hidden": {"loss": "mse"}, "attention": {"relation_heads": 4}}
# a student, whether another model teaches it, and how
SHARDED = {
    "answers": (lambda: tiny.llama(tie_word_embeddings=False), True, {"temperature": 2.0}),
    "everything, tied": (lambda: tiny.llama(tie_word_embeddings=True), True, EVERYTHING),
    "a copy of itself": (tiny.llama, False, EVERYTHING),
    "without its adapters": (lora, False, {"temperature": 2.0}),
    "without adapters of the head": (lora_head, False, {"temperature": 2.0}),
}


def save_gradients(folder: str) -> None:
    """What one of one or two processes runs."""
    size, rank = place()
    found = {}
    for name, run in RUNS.items():
        run = run.but(settings=run.settings | ({"ddp_backend": "gloo"} if size > 1 else {}))
        found[name] = run.gradient(Path(folder) / name, 4 // size, 2)
    for name, (student, has_teacher, config) in SHARDED.items():
        found[f"FSDP2, {name}"] = sharded_gradient(folder, student().train(), has_teacher, config)
    if size > 1:
        with pytest.raises(SlimError, match="`on_policy` generates text"):
            sharded_gradient(folder, tiny.llama().train(), True, {"on_policy": {}})
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")


def sharded_gradient(folder: str, model: nn.Module, has_teacher: bool, config: dict) -> dict[str, torch.Tensor]:
    """Of a model whose weights are spread over the processes as accelerate does it; whole, as every process has it.

    Accelerate itself turns FSDP into DDP where there is no GPU, so that its own steps are called.
    """
    size, rank = place()
    callback = DistillationCallback(config, teacher=freeze_(tiny.llama(seed=7, **WIDE)) if has_teacher else None)
    args, state = TrainingArguments(folder, **SETTINGS), TrainerState(max_steps=1)
    callback.on_init_end(args, state, TrainerControl(), model)
    if size > 1:
        model = fsdp2_prepare_model(accelerator_of_fsdp(rank), model)
    callback.on_train_begin(args, state, TrainerControl(), model)
    data = {name: torch.tensor(column) for name, column in padded_text().to_dict().items()}
    items = (data["labels"][:, 1:] != -100).sum()
    mine = {name: value.chunk(size)[rank] for name, value in data.items()}
    for _ in range(2):  # twice, because the first pass must restore the state of the models
        model.zero_grad()
        (model(**mine, num_items_in_batch=items).loss * size).backward()  # gradients are averaged over the processes
        if size > 1:
            assert all(part.to_local().numel() < part.numel() for part in callback.teacher.parameters())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if size > 1 else grad for name, grad in found.items()}


def accelerator_of_fsdp(rank: int) -> SimpleNamespace:
    """The part of an accelerator that `fsdp2_prepare_model` reads."""
    os.environ["FSDP_VERSION"] = "2"
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    init_device_mesh("cpu", (2,))
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=None, is_main_process=rank == 0,
        mixed_precision="no", device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_compute_the_gradient_of_one(tmp_path):
    one, two = (in_processes(save_gradients, tmp_path / str(count), count) for count in (1, 2))
    assert one.keys() == two.keys()
    errors = {name: error(two[name], gradient) for name, gradient in one.items()}
    assert max(errors.values()) < 1e-6, errors
