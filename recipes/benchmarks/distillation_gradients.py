"""Whether a distillation step is exact: its gradient when a batch is cut up, against the gradient of the whole batch.

The same 8 ragged texts are cut into 4 micro-batches of 2, or divided over 2 processes (gloo), for every trainer by
one harness; tiny Llamas, float32, CPU. Measures: the relative error of the whole gradient in the Euclidean norm, and
the factor by which its length is off. TRL's GKD and GOLD run off-policy (`lmbda=0`) on the same tokens and labels.
TRL's DistillationTrainer cannot run here: it learns only from what its student writes itself, so there is no fixed
batch to cut up. A trainer that fails leaves its message instead of numbers.

    python recipes/benchmarks/distillation_gradients.py                 # needs trl; a minute on 2 cores
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from harness.command import Run, parser_of, run_script
from harness.results import Values
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_slim import DistillationCallback
from hf_slim.distillation.teachers.live import freeze_

VOCABULARY, ROWS, LENGTH = 96, 8, 16
TRAINING = {
    "max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "save_strategy": "no", "logging_strategy": "no",
    "use_cpu": True, "disable_tqdm": True, "train_sampling_strategy": "sequential", "remove_unused_columns": False,
}  # fmt: skip
# rows of a micro-batch, micro-batches, processes
WHOLE = "1 x 8"
CUTS = {WHOLE: (8, 1, 1), "4 x 2": (2, 4, 1), "2 processes": (4, 1, 2), "2 processes, 2 x 2": (2, 2, 2)}
TRL = {"bf16": False, "max_length": None}
OFF_POLICY = TRL | {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0}  # beta 0: forward KL


def llama(seed: int) -> LlamaForCausalLM:
    """Random weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **sizes))


def texts() -> Dataset:
    """Of different lengths, with 1 to 13 labels each."""
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(ROWS):
        mask[row, LENGTH - row % 3 :] = 0
        labels[row, : 14 - 2 * row if row < 7 else 1] = -100
    labels[mask == 0] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()})


def tokenizer() -> PreTrainedTokenizerFast:
    """TRL's trainers want one; the texts are tokens already."""
    words = {"<end>": 0} | {f"w{number}": number for number in range(1, VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<end>")), eos_token="<end>", pad_token="<end>"
    )


class Keep(TrainerCallback):
    """Keeps the gradient of the first optimizer step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def plain(args: dict[str, Any], **given: Any) -> Trainer:
    """hf_slim: the callback in transformers' Trainer."""
    callbacks = [DistillationCallback(teacher=freeze_(llama(7))), *given.pop("callbacks")]
    return Trainer(args=TrainingArguments(**args), callbacks=callbacks, **given)


def sft(args: dict[str, Any], **given: Any) -> Trainer:
    """hf_slim: the callback attached to TRL's SFTTrainer."""
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(**args, **TRL, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = SFTTrainer(args=settings, processing_class=tokenizer(), **given)
    DistillationCallback(teacher=freeze_(llama(7))).attach(trainer)
    return trainer


def gkd(args: dict[str, Any], **given: Any) -> Trainer:
    """TRL."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    settings = GKDConfig(**args, **OFF_POLICY)
    return GKDTrainer(teacher_model=freeze_(llama(7)), args=settings, processing_class=tokenizer(), **given)


def gold(args: dict[str, Any], **given: Any) -> Trainer:
    """TRL."""
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    settings = GOLDConfig(**args, **OFF_POLICY, use_uld_loss=False)
    return GOLDTrainer(teacher_model=freeze_(llama(7)), args=settings, processing_class=tokenizer(), **given)


SIDES: dict[str, Callable[..., Trainer]] = {
    "hf_slim, `Trainer`": plain, "hf_slim attached to TRL's `SFTTrainer`": sft, "TRL `GKDTrainer`": gkd,
    "TRL `GOLDTrainer`": gold,
}  # fmt: skip


def gradient(build: Callable[..., Trainer], rows: int, micro_batches: int, folder: str) -> Tensor | str:
    """Of one step; why not, where the trainer fails."""
    args = TRAINING | {"output_dir": folder, "per_device_train_batch_size": rows}
    args |= {"gradient_accumulation_steps": micro_batches}
    args |= {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    watch = Keep()
    try:
        build(
            args, model=llama(0), train_dataset=texts(), data_collator=default_data_collator, callbacks=[watch]
        ).train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return watch.gradient


def work(cut: str, folder: str, sides: list[str]) -> None:
    """One process: the gradient of every side, in files of the first."""
    rows, micro_batches, _ = CUTS[cut]
    found = {name: gradient(SIDES[name], rows, micro_batches, folder) for name in sides}
    if int(os.environ.get("RANK", 0)) == 0:
        failed = {name: message for name, message in found.items() if isinstance(message, str)}
        (Path(folder) / "failed.json").write_text(json.dumps(failed))
        save_file({name: found[name] for name in found.keys() - failed}, Path(folder) / "gradients.safetensors")


def gradients(cut: str, sides: list[str]) -> dict[str, Tensor | str]:
    """By side, from fresh processes."""
    processes = CUTS[cut][2]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, __file__, "--cut", cut, "--scratch", folder, "--sides", *sides]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        failed = json.loads((Path(folder) / "failed.json").read_text())
        return load_file(Path(folder) / "gradients.safetensors") | failed


def compared(found: Tensor | str, whole: Tensor | str) -> Values:
    """Relative error, and length against that of the whole batch; the message of what failed."""
    failed = next((message for message in (whole, found) if isinstance(message, str)), None)
    if failed:
        return {"failed": failed}
    error = (found.double() - whole.double()).norm() / whole.double().norm()
    return {"relative_error": error.item(), "length": (found.norm() / whole.norm()).item()}


def measured(cuts: list[str], sides: list[str]) -> dict[str, Values]:
    """The rows "TRL `GKDTrainer`, 4 x 2", ..., against the whole batch."""
    whole = gradients(WHOLE, sides)
    rows = {}
    for cut in cuts:
        found = gradients(cut, sides)
        rows |= {f"{name}, {cut}": compared(found[name], whole[name]) for name in sides}
    return rows


def main(run: Run) -> None:
    """Measures every cut."""
    options = run.options
    if options.cut:  # a process that this script started
        work(options.cut, options.scratch, options.sides)
        return
    sides = options.sides if run.has_peer("trl") else ["hf_slim, `Trainer`"]
    cuts = [cut for cut in options.cuts if cut != WHOLE]
    settings = {"rows": ROWS, "length": LENGTH, "vocabulary": VOCABULARY, "beta": OFF_POLICY["beta"]}
    results = run.results("distillation_gradients", settings, [0, 7], ["trl"])
    results.together([f"{name}, {cut}" for cut in cuts for name in sides], lambda: measured(cuts, sides))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = parser_of(__doc__)
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), choices=list(CUTS))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--cut", choices=CUTS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    run_script(parser, main, smoke={"cuts": ["2 processes, 2 x 2"]})
