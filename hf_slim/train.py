"""A recipe from start to end: train with the callbacks, save, reload, measure, report."""

import ctypes
import datetime
import gc
import json
import logging
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, Trainer, default_data_collator

from hf_slim.core.errors import SlimError
from hf_slim.core.report import SCHEMA_VERSION, as_markdown, ratios, write_atomically
from hf_slim.evaluation.data import load_texts, text_blocks
from hf_slim.evaluation.picture import draw
from hf_slim.evaluation.training_speed import callbacks_for
from hf_slim.integration.loading import load_model, load_tokenizer
from hf_slim.integration.saving import check_output, publish, save
from hf_slim.measure import compare, training_step_ms
from hf_slim.quantization.plan import plan_quantization
from hf_slim.recipe import Recipe
from hf_slim.version import __version__

logger = logging.getLogger(__name__)


def run(recipe: Recipe, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Trains, saves and measures; the report, also written to the output folder as JSON, Markdown and PNG.

    Args:
        overwrite: Replace a finished model in the output folder, once the new one is complete.
        resume: Continue from the last complete checkpoint of an interrupted run.
    Raises: SlimError: for anything that can be known before training.
    """
    output = Path(recipe.output)
    check_output(output, overwrite)
    with tempfile.TemporaryDirectory(prefix="hf_slim-") as scratch:
        base = str(Path(scratch) / "base")
        layers, log = _train(recipe, Path(scratch), resume)
        measured = compare(base, str(output), recipe.data, recipe.evaluation)
        if recipe.techniques:
            for side, steps in training_step_ms(base, recipe).items():
                measured[side]["training"] = {"step_ms": steps}
    report = build_report(recipe, measured, layers, log)
    write_report(report, output)
    return report


def _train(recipe: Recipe, scratch: Path, resume: bool) -> tuple[list[dict[str, Any]], list[dict]]:
    """Trains and saves; leaves the untouched base model in `scratch/base`. Returns layers and the Trainer's log."""
    output = Path(recipe.output)
    keeps_checkpoints = recipe.training.get("save_strategy", "no") != "no"
    checkpoints = output.with_name(f"{output.name}.checkpoints") if keeps_checkpoints else scratch / "trainer"
    args = recipe.training_arguments(str(checkpoints))
    train_texts, _ = load_texts(recipe.data)
    tokenizer = load_tokenizer(recipe.model)
    model = load_model(recipe.model)
    layers = layer_fates(model, recipe)
    blocks = text_blocks(train_texts, tokenizer, recipe.data, _blocks_needed(args), args.seed, "reading training text")
    checkpoint = last_checkpoint(checkpoints) if resume else None
    save(model, tokenizer, scratch / "base")
    try:
        trainer = Trainer(
            model, args, train_dataset=blocks, data_collator=default_data_collator,
            processing_class=tokenizer, callbacks=callbacks_for(list(recipe.techniques.values())),
        )  # fmt: skip
    except SlimError:
        if checkpoints.is_dir() and not any(checkpoints.iterdir()):
            checkpoints.rmdir()  # the Trainer makes it before callbacks can object
        raise
    trainer.train(resume_from_checkpoint=checkpoint)
    publish(model, tokenizer, output)
    log = trainer.state.log_history
    del trainer, model
    _return_memory()
    return layers, log


def _return_memory() -> None:
    """Gives what training used back to the system, so that it is there for the processes that measure."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc keeps gigabytes of freed tensors otherwise
    except (OSError, AttributeError):
        return  # another libc: it has no such call


def _blocks_needed(args: transformers.TrainingArguments) -> int:
    """Examples for every optimizer step, or for one epoch of at most 100,000 where no number of steps is given."""
    if args.max_steps > 0:
        return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return 100_000


def layer_fates(model: PreTrainedModel, recipe: Recipe) -> list[dict[str, Any]]:
    """What becomes of each layer: its grid, or why it stays in floating point."""
    if recipe.quantization is None:
        return []
    return [
        {"name": plan.name, "scheme": str(plan.scheme) if plan.scheme else None, "reason": plan.reason}
        for plan in plan_quantization(model, recipe.quantization)
    ]


def last_checkpoint(folder: Path) -> str:
    """The Trainer's newest complete checkpoint; one that was cut short or damaged is passed over.

    Raises: SlimError: if there is none.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())  # the Trainer writes this file last
            for file in checkpoint.glob("*.safetensors"):
                with safe_open(file, "pt"):  # compares the header with the length of the file
                    pass
        except (OSError, ValueError, SafetensorError):
            logger.warning("Checkpoint %s is incomplete or damaged and is passed over.", checkpoint)
            continue
        return str(checkpoint)
    raise SlimError(
        f"There is no complete checkpoint in '{folder}' to resume from. Set `training.save_strategy: steps` and "
        "`training.save_steps`, or start without --resume."
    )


def build_report(recipe: Recipe, measured: dict[str, Any], layers: list[dict], log: list[dict]) -> dict[str, Any]:
    """Every number of the run, with what is needed to repeat it."""
    report = {
        "schema_version": SCHEMA_VERSION,
        "title": f"{Path(recipe.model).name}: {' + '.join(recipe.techniques) or 'fine-tuning only'}",
        "hf_slim_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "seed": recipe.training.get("seed", 42),
        "recipe": recipe.to_dict(),
        "base": measured["base"],
        "result": measured["result"],
        "layers": layers,
        "training_log": log,
    }
    report["ratios"] = ratios(report)
    return report


def environment() -> dict[str, str]:
    """The machine and the versions that the numbers belong to."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_report(report: dict[str, Any], folder: Path) -> None:
    """report.json, report.md and report.png in `folder`, each moved into place when complete."""
    write_atomically(folder / "report.json", lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    write_atomically(folder / "report.md", lambda path: path.write_text(as_markdown(report)))
    picture = folder / "report.png"
    if draw(report, folder / ".report.png"):
        os.replace(folder / ".report.png", picture)
