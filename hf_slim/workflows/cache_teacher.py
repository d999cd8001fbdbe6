"""Runs a recipe's teacher once over the training examples and stores its predictions: `hf-slim cache-teacher`."""

import inspect
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_slim.core.errors import SlimConfigError, SlimError
from hf_slim.core.running.calibration import precision_of_run
from hf_slim.data import reading_once
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.store.format import StoreInfo, model_hash, row_key, tokenizer_hash
from hf_slim.distillation.store.reader import StoredTeacher, is_stored_teacher
from hf_slim.distillation.store.writer import StoredTeacherWriter, finish_store
from hf_slim.distillation.teachers.live import LiveTeacher, TeacherRequest, check_teacher, freeze_
from hf_slim.evaluation.tasks.task import TASKS
from hf_slim.integration.loading import load_config, load_model
from hf_slim.progress import progress
from hf_slim.recipe import Recipe
from hf_slim.workflows.train import load_base, training_examples, trim_vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachingInputs:
    """Inputs of a caching run: teacher, tokenizer, and de-duplicated, length-sorted batches.

    Attributes:
        rows: Training examples, with the columns that the model reads.
        batches: Indices into `rows`, without duplicate examples, sorted by length with the longest first.
        keys: `row_key` of every row.
        lengths: Number of tokens of every row.
    """

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    batches: list[list[int]]
    keys: list[int]
    lengths: list[int]


@reading_once()
def cache_teacher(
    recipe: Recipe | str | Path,
    output: Path | None = None,
    k: int = 64,
    overwrite: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Stores the teacher's predictions for every example that training would use: `hf-slim cache-teacher`.

    Several processes, launched as for training, share the examples; each writes shards, and the first the manifest.

    Args:
        recipe: A recipe with a `distillation` section, or the path of one.
        output: Folder of the store; `default_output` if None. It appears only when the store is complete.
        k: Most probable classes that are stored of every prediction; at most all classes.
        overwrite: Replace a finished store, once the new one is complete, and delete an interrupted one.
        resume: Keep the shards of an interrupted run, if there are any, and compute the rest.
    Returns: examples, tokens, predictions and bytes of the store, and the share of the probability mass in it.
    Raises: SlimError: for every error that can be found before the teacher runs.
    """
    started, recipe = time.perf_counter(), Recipe.of(recipe)
    stage = _distilling_stages(recipe)[0]
    output = output or default_output(recipe)
    partial = output.with_name(f"{output.name}.partial")  # on the same disk, so that it can be moved into place
    _check_output(output, partial, overwrite, resume)
    args = stage.training_arguments(str(output))
    inputs = _prepare(recipe, args)
    info = _info(inputs, stage, args, k)
    _check_space(output, info, inputs)
    if not resume:
        _on_first_rank(args, lambda: shutil.rmtree(partial, ignore_errors=True))
    with StoredTeacherWriter(partial, info, args.process_index, resume) as writer:
        _store_predictions(inputs, writer, stage, args)
    _on_first_rank(args, lambda: _publish(partial, output, info))
    store = StoredTeacher.open(output)
    store.check_data(inputs.rows)
    report = _report(inputs, store.manifest) | {"output": str(output), "processes": args.world_size}
    return report | {"minutes": (time.perf_counter() - started) / 60}


def as_text(report: dict[str, Any]) -> str:
    """The report of `cache_teacher` as text."""
    processes = f"{report['processes']} process{'es' * (report['processes'] > 1)}"
    return (
        f"{report['examples']:,} different examples, {report['tokens']:,} tokens, for training with {processes}\n"
        f"{report['bytes'] / 1e6:,.1f} MB, {report['bytes_per_answer']:.1f} bytes per {report['per']}\n"
        f"{report['mass_held']:.2%} of the probability mass: {report['k']} of {report['n_classes']:,} classes stored\n"
        f"{report['minutes']:.1f} minutes\n\nSaved to {report['output']}"
    )


def default_output(recipe: Recipe) -> Path:
    """The recipe's output folder with `.teacher` added to its name."""
    return Path(f"{recipe.output}.teacher")


def next_settings(recipe: Recipe, output: str) -> list[str]:
    """The `--set` options with which the recipe trains from the store."""
    numbers = [number for number, run in enumerate(recipe.stages, 1) if _settings(run) != _settings(recipe)]
    own = [f"stages.{number}." for number in numbers if _settings(recipe.runs[number - 1])]
    return [f"{place}distillation.teacher={output}" for place in ([""] if _settings(recipe) else []) + own]


def _settings(run: Recipe) -> DistillationConfig | None:
    return run.techniques.get("distillation")


def _distilling_stages(recipe: Recipe) -> list[Recipe]:
    """The stages with distillation. Raises SlimConfigError unless they all have one and the same teacher."""
    found = [(number, run) for number, run in enumerate(recipe.runs, 1) if _settings(run)]
    if not found:
        raise SlimConfigError(
            "The recipe has no `distillation` section, so there is no teacher to run. Add one, such as "
            "`distillation: {teacher: self}`."
        )
    for number, run in found:
        config, first = _settings(run), _settings(found[0][1])
        if not isinstance(config.teacher, str):
            raise SlimConfigError(
                f"A store holds the predictions of one teacher, and `teacher` names {len(config.teacher)}: "
                f"{config.teacher}. Name one, or train with several teachers in memory."
            )
        if config.teacher == "self" and number > 1:
            raise SlimConfigError(
                f"Stage {number} has the teacher 'self', which is the model that stage {number - 1} will train, so it "
                "does not exist yet. Name a saved model as `teacher`, or train this stage with its teacher in memory."
            )
        if (config.teacher, config.temperature) != (first.teacher, first.temperature):
            raise SlimConfigError(
                f"Stages {found[0][0]} and {number} have different teachers or temperatures, and a store holds one. "
                "Store each in a separate run: switch off the other, such as by `--set stages.2.distillation=null`."
            )
        if config.teacher != "self" and is_stored_teacher(config.teacher):
            raise SlimConfigError(
                f"The teacher '{config.teacher}' is already a stored teacher. Train with it, or name the model: "
                "`--set distillation.teacher=...`."
            )
    return [run for _, run in found]


def _check_output(output: Path, partial: Path, overwrite: bool, resume: bool) -> None:
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not is_stored_teacher(output)):
        raise SlimError(f"'{output}' is a file, or a folder with other files in it. Choose a new or an empty folder.")
    if is_stored_teacher(output) and not overwrite:
        raise SlimError(
            f"'{output}' already holds a stored teacher. Choose another folder, or pass --overwrite to replace it "
            "once the new one is complete."
        )
    if is_stored_teacher(partial) and not overwrite and not resume:
        raise SlimError(
            f"'{partial}' holds predictions of an interrupted run. Pass --resume to continue it, or --overwrite to "
            "start again."
        )


def _prepare(recipe: Recipe, args: TrainingArguments) -> CachingInputs:
    """The teacher and the examples, the same ones as in training."""
    stages = _distilling_stages(recipe)
    name, task = _settings(stages[0]).teacher, TASKS[recipe.task]
    student, tokenizer, _ = load_base(recipe)
    if recipe.vocabulary is not None:
        with tempfile.TemporaryDirectory(prefix="hf_slim-") as scratch:
            tokenizer = trim_vocabulary(recipe, student, tokenizer, Path(scratch))
    label2id, arguments = student.config.label2id, inspect.signature(student.forward).parameters
    teacher = student
    if name != "self":
        student.to("meta")  # frees the weights; its config is still needed
        teacher = load_model(name, load_config(name).dtype or torch.float32, task.auto_class)
        check_teacher(student, teacher)
    read = [training_examples(run, tokenizer, label2id, run.training_arguments(run.output)) for run in stages]
    rows = concatenate_datasets(read)
    rows = rows.select_columns([column for column in rows.column_names if column in arguments and column != "labels"])
    bar = progress(rows, "hashing examples", "example", shown=_shows_progress(args))
    keys, lengths = zip(*map(row_key, bar), strict=True)
    unique = {key: index for index, key in reversed(list(enumerate(keys)))}.values()  # the first of equal ones
    order = sorted(unique, key=lambda index: (-lengths[index], index))
    size = args.per_device_train_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return CachingInputs(freeze_(teacher), tokenizer, rows, batches, keys, lengths)


def _info(inputs: CachingInputs, stage: Recipe, args: TrainingArguments, k: int) -> StoreInfo:
    """The metadata of the store; the teacher runs on the shortest example, to find the shape of its predictions."""
    teacher_hash = model_hash(inputs.teacher)
    logits = _run_teacher(inputs, inputs.batches[-1][-1:], stage, args)[1]
    autocast = precision_of_run(args.bf16, args.fp16)
    name = _settings(stage).teacher
    return StoreInfo(
        k=min(k, logits.shape[-1]),
        n_classes=logits.shape[-1],
        per="token" if logits.dim() == 3 else "example",
        temperature=_settings(stage).temperature,
        dtype=str(autocast or inputs.teacher.dtype).removeprefix("torch."),
        tokenizer_hash=tokenizer_hash(inputs.tokenizer),
        teacher_hash=teacher_hash,
        teacher=stage.model if name == "self" else name,
    )


def _check_space(output: Path, info: StoreInfo, inputs: CachingInputs) -> None:
    indices = [index for batch in inputs.batches for index in batch]
    answers = sum(inputs.lengths[index] for index in indices) if info.per == "token" else len(indices)
    needed = answers * info.k * (2 + info.id_dtype.itemsize)
    free = shutil.disk_usage(next(path for path in output.absolute().parents if path.exists())).free
    if needed > free:
        raise SlimError(
            f"The store needs {needed / 1e9:.1f} GB, and '{output.parent}' has {free / 1e9:.1f} GB free. Lower --k, "
            "or choose another folder with --output."
        )


def _store_predictions(
    inputs: CachingInputs, writer: StoredTeacherWriter, stage: Recipe, args: TrainingArguments
) -> None:
    """Stores this rank's share of the batches. A resumed run has the same batches, and so the same predictions."""
    mine = inputs.batches[args.process_index :: args.world_size]
    total = sum(inputs.lengths[index] for batch in mine for index in batch)
    logger.info("Running the teacher over %d tokens.", total)
    with progress(None, "running the teacher", "token", total, _shows_progress(args), scaled=True) as bar:
        for batch in mine:
            if not all(inputs.keys[index] in writer.keys for index in batch):
                writer.add(*_run_teacher(inputs, batch, stage, args))
            bar.update(sum(inputs.lengths[index] for index in batch))


@torch.inference_mode()
def _run_teacher(
    inputs: CachingInputs, batch: list[int], stage: Recipe, args: TrainingArguments
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The inputs of a batch, and the teacher's logits."""
    collate = TASKS[stage.task].collator(inputs.tokenizer)
    model_inputs = {
        name: values.to(args.device) for name, values in collate([inputs.rows[index] for index in batch]).items()
    }
    predictions = (
        LiveTeacher(inputs.teacher)
        .forward(model_inputs, TeacherRequest(precision_of_run(args.bf16, args.fp16)))
        .predictions
    )
    logits = predictions.at(torch.arange(len(predictions.states), device=args.device)).states
    ids = model_inputs["input_ids"]
    return model_inputs, logits if len(logits) == len(ids) else logits.unflatten(0, ids.shape)


def _shows_progress(args: TrainingArguments) -> bool:
    return not args.disable_tqdm and args.process_index == 0


def _on_first_rank(args: TrainingArguments, act: Callable[[], Any]) -> None:
    """Calls `act` on the first rank, while all other ranks wait."""
    args.distributed_state.wait_for_everyone()
    if args.process_index == 0:
        act()
    args.distributed_state.wait_for_everyone()


def _report(inputs: CachingInputs, manifest: dict[str, Any]) -> dict[str, Any]:
    size = sum(shard["size_bytes"] for shard in manifest["shards"])
    return {
        "examples": sum(len(batch) for batch in inputs.batches),
        "tokens": sum(inputs.lengths[index] for batch in inputs.batches for index in batch),
        "bytes": size,
        "bytes_per_answer": size / manifest["n_answers"],
        **{name: manifest[name] for name in ("k", "n_classes", "per", "n_answers", "mass_held")},
    }


def _publish(partial: Path, output: Path, info: StoreInfo) -> None:
    """Finishes the store and moves it into place; an older store is not deleted before."""
    finish_store(partial, info)
    replaced = output.with_name(f"{output.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        os.replace(output, replaced)
    os.replace(partial, output)
    shutil.rmtree(replaced, ignore_errors=True)
