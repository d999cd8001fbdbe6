"""Whether a distillation step is exact: its gradient when a batch is cut up, against the gradient of the whole batch.

The same 8 ragged texts are cut into 4 micro-batches of 2, or shared out over 2 processes (gloo), for every trainer by
one harness; tiny Llamas, float32, CPU. Columns: the relative error of the whole gradient in the Euclidean norm, and
the factor by which its length is off. TRL's GKD and GOLD run off-policy (`lmbda=0`) on the same tokens and labels.
'-' is what cannot run: TRL's DistillationTrainer learns only from what its student writes itself, so there is no
fixed batch to cut up. DistillKit, TextBrewer and ModelOpt are not installed by this project's extras.

    python recipes/benchmarks/distillation_gradients.py                 # needs trl; a minute on 2 cores
"""

import argparse
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
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from hf_slim import DistillationCallback
from hf_slim.distillation.teachers.live import freeze_
from hf_slim.workflows.evaluate import quiet_libraries

VOCABULARY, ROWS, LENGTH = 96, 8, 16
TRAINING = {
    "max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "save_strategy": "no", "logging_strategy": "no",
    "use_cpu": True, "disable_tqdm": True, "train_sampling_strategy": "sequential", "remove_unused_columns": False,
}  # fmt: skip
# rows of a micro-batch, micro-batches, processes
CUTS = {"1 x 8": (8, 1, 1), "4 x 2": (2, 4, 1), "2 processes": (4, 1, 2), "2 processes, 2 x 2": (2, 2, 2)}
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
    settings = SFTConfig(**args, **TRL, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = SFTTrainer(args=settings, processing_class=tokenizer(), **given)
    DistillationCallback(teacher=freeze_(llama(7))).attach(trainer)
    return trainer


def gkd(args: dict[str, Any], **given: Any) -> Trainer:
    """TRL."""
    settings = GKDConfig(**args, **OFF_POLICY)
    return GKDTrainer(teacher_model=freeze_(llama(7)), args=settings, processing_class=tokenizer(), **given)


def gold(args: dict[str, Any], **given: Any) -> Trainer:
    """TRL."""
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


def work(cut: str, folder: str) -> None:
    """One process: the gradient of every side, in a file of the first."""
    rows, micro_batches, _ = CUTS[cut]
    found = {name: gradient(build, rows, micro_batches, folder) for name, build in SIDES.items()}
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(found, Path(folder) / "gradients.pt")


def gradients(cut: str) -> dict[str, Tensor | str]:
    """By side, from fresh processes."""
    processes = CUTS[cut][2]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, __file__, "--cut", cut, "--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return torch.load(Path(folder) / "gradients.pt")


def cell(found: Tensor | str, whole: Tensor | str) -> str:
    """Relative error, and length against that of the whole batch."""
    if isinstance(found, str) or isinstance(whole, str):
        return "-"
    error = (found.double() - whole.double()).norm() / whole.double().norm()
    return f"{error:.1e} ({found.norm() / whole.norm():.2f}x)"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cut", choices=CUTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    warnings.simplefilter("ignore")
    if options.cut:
        work(options.cut, options.folder)
        return
    found = {cut: gradients(cut) for cut in CUTS}
    whole = found.pop("1 x 8")
    print("| | " + " | ".join(f"{cut} against 1 x 8" for cut in found) + " |")
    print("|---" * (1 + len(found)) + "|")
    for name in SIDES:
        print(f"| {name} | " + " | ".join(cell(part[name], whole[name]) for part in found.values()) + " |")
    print("| TRL `DistillationTrainer` | " + " | ".join("-" for _ in found) + " |")
    for name, answer in whole.items():
        if isinstance(answer, str):
            print(f"\n{name}: {answer}")


if __name__ == "__main__":
    main()
