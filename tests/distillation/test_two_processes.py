"""Two processes teach what one teaches: under DDP through the Trainer, and under FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_slim import DistillationCallback
from hf_slim.distillation.teacher import freeze_
from tests import tiny
from tests.distillation.gradients import ROWS, SETTINGS, error, padded_text
from tests.distillation.test_gradients import CLASSES, HIDDEN, LLAMA, SFT, TRAINERS, completions

ROOT = Path(__file__).parents[2]
RUNS = {
    "answers and task": LLAMA.but(config={"temperature": 2.0}),
    "projections": HIDDEN["mse, projected"],
    "label smoothing": TRAINERS["label smoothing"],
    "own loss": TRAINERS["own loss"],
    "classes": CLASSES,
    # every row with an answer: the same 8 rows whatever the number of processes
    "SFTTrainer": SFT.but(data=lambda: completions(tiny.text_data(ROWS, ragged=True))),
}
LAUNCHER = "import sys; from tests.distillation.test_two_processes import save_gradients; save_gradients(sys.argv[1])"


def save_gradients(folder: str) -> None:
    """What one of one or two processes runs."""
    torch.set_num_threads(1)
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    found = {}
    for name, run in RUNS.items():
        run = run.but(settings=run.settings | ({"ddp_backend": "gloo"} if size > 1 else {}))
        found[name] = run.gradient(Path(folder) / name, 4 // size, 2)
    found |= {f"FSDP2, {name}": sharded(folder, size, rank, config) for name, config in SHARDED.items()}
    if rank == 0:
        torch.save(found, Path(folder) / "gradients.pt")


SHARDED = {
    "answers": {"temperature": 2.0},
    "everything": {"temperature": 2.0, "hidden": {"loss": "mse"}, "attention": {"relation_heads": 4}},
}


def sharded(folder: str, size: int, rank: int, config: dict) -> dict[str, torch.Tensor]:
    """The gradient of a model whose parameters are spread over the processes; whole, as every process has it."""
    model = tiny.llama().train()
    wise = tiny.llama(seed=7, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    callback = DistillationCallback(config, teacher=freeze_(wise))
    state = TrainerState(max_steps=1)
    callback.on_init_end(TrainingArguments(folder, **SETTINGS), state, TrainerControl(), model)  # before sharding
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    data = {name: torch.tensor(column) for name, column in padded_text().to_dict().items()}
    items = (data["labels"][:, 1:] != -100).sum()
    mine = {name: value.chunk(size)[rank] for name, value in data.items()}
    (model(**mine, num_items_in_batch=items).loss * size).backward()  # gradients are averaged over the processes
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def run(folder: Path, processes: int) -> dict[str, dict[str, torch.Tensor]]:
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(LAUNCHER)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=29518"]
    done = subprocess.run(
        [*launcher, str(script), str(folder)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "gradients.pt")


@pytest.mark.slow
def test_two_processes_teach_what_one_teaches(tmp_path):
    one, two = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    assert one.keys() == two.keys()
    errors = {name: error(two[name], gradient) for name, gradient in one.items()}
    assert max(errors.values()) < 1e-6, errors
