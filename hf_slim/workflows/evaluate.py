"""Measures saved models as a user would run them: each is loaded from disk in a new process."""

import json
import logging
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimError
from hf_slim.core.report import ratios, write_atomically
from hf_slim.data import DataConfig, load_held_out, load_texts, reading_once
from hf_slim.evaluation.compare import measure_models, vocabulary_size
from hf_slim.evaluation.config import EvaluationConfig
from hf_slim.evaluation.footprint import disk_bytes, peak_rss_bytes
from hf_slim.evaluation.tasks.task import TASKS, Side
from hf_slim.evaluation.training_speed import StepTiming, training_speed
from hf_slim.integration.loading import has_head, load_config, load_model, load_tokenizer
from hf_slim.progress import progress
from hf_slim.recipe import Recipe
from hf_slim.student import make_student
from hf_slim.workflows.report import provenance
from hf_slim.workflows.verbosity import set_verbosity, verbosity

logger = logging.getLogger(__name__)
Measures = dict[str, Any]


@reading_once()
def evaluate(
    model: str,
    against: str,
    data: DataConfig | None = None,
    settings: EvaluationConfig | None = None,
    json_file: str | Path | None = None,
) -> dict[str, Any]:
    """Compares a compressed model with its original: `hf-slim eval`.

    Measures quality, bytes, parameters, multiply-adds and inference speed.

    Args:
        model: The compressed model: a folder, a Hub id, or `package:<module>/<file>`.
        against: The model that it was made from, named in the same way.
        data: Source of the held-out text; None: Python's standard library.
        settings: How much is measured.
        json_file: If given, all numbers are also written to this file.
    Returns: `{"title": text, "base": measures, "result": measures, "ratios": {label: improvement factor}}`, with
        versions, machine and sources; `core.report.as_text` makes a table of it, and `write_card` a card.
    Raises: SlimError: if a model cannot be loaded, the data cannot be read, or the two tokenize it differently.
    """
    data, settings = data or DataConfig(), settings or EvaluationConfig()
    task = task_of(model)
    measured = compare(task, against, model, load_held_out(data, TASKS[task].columns(data)), data, settings)
    report = {
        "title": f"{model} against {against}",
        **provenance(against, [data], Path(model) if Path(model).is_dir() else None),
        "recipe": {"model": against, "data": data.to_dict(), "evaluation": settings.to_dict()},
        **measured,
        "ratios": ratios(measured),
    }
    if json_file is not None:
        write_atomically(Path(json_file), lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    return report


def compare(
    task: str, base: str, result: str, held_out: Dataset, data: DataConfig, settings: EvaluationConfig
) -> dict[str, Measures]:
    """Quality, memory, compute and inference speed of two models, timed in turn.

    Args:
        task: A name in `TASKS`.
        base: The original model: a folder, a Hub id, or `package:<module>/<file>`.
        result: The compressed model.
        held_out: Texts that neither model was trained on; `load_held_out` for models of another run.
        data: How the texts are read.
    Returns: `{"base": measures, "result": measures}`; both are evaluated on the same held-out text.
    """
    with tempfile.TemporaryDirectory(prefix="hf_slim-") as scratch:
        folders = {
            "base": _as_folder(task, base, Path(scratch) / "base"),
            "result": _as_folder(task, result, Path(scratch) / "result"),
        }
        logger.info("Measuring quality, size and speed of both models, in a separate process.")
        measured = in_fresh_process(_side_by_side, task, folders, held_out, data, settings)
        for name, folder in progress(folders.items(), "measuring peak memory", "model"):
            peak = in_fresh_process(_peak_memory, task, folder, data, settings, settings.dtype_of(name))
            measured[name]["memory"] |= {"disk_bytes": disk_bytes(folder), "peak_rss_bytes": peak}
    return measured


def task_of(spec: str) -> str:
    """The task that a saved model has a head for; "causal-lm" if its files do not tell."""
    config = load_config(spec)
    return next((name for name in TASKS if has_head(config, TASKS[name].auto_class)), "causal-lm")


def training_step_ms(base: str, recipe: Recipe) -> dict[str, dict]:
    """Milliseconds of a plain training step ("base") and of one with the recipe's callbacks ("result")."""
    logger.info("Timing training steps, in a separate process.")
    texts, _ = load_texts(recipe.data, TASKS[recipe.task].columns(recipe.data))
    return in_fresh_process(_training_speed, base, texts, recipe)


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """The result of a module-level function, computed in a new Python process that ends afterwards."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        max_workers=1, mp_context=context, initializer=set_verbosity, initargs=(verbosity(),)
    ) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise SlimError(
                "The measuring process was killed, probably because memory ran out. A model that was "
                "trained is saved: free some memory, then measure it with `hf-slim eval`."
            ) from error


def _as_folder(task: str, spec: str, scratch: Path) -> str:
    """The folder of a saved model; any other model is first saved to `scratch`."""
    if Path(spec).is_dir():
        return spec
    load_model(spec, auto_class=TASKS[task].auto_class).save_pretrained(scratch)
    load_tokenizer(spec).save_pretrained(scratch)
    return str(scratch)


def _side_by_side(
    task_name: str, folders: dict[str, str], held_out: Dataset, data: DataConfig, settings: EvaluationConfig
) -> dict[str, Measures]:
    task = TASKS[task_name]
    tokenizer = load_tokenizer(folders["base"])
    sides = {}
    for name, folder in progress(folders.items(), "loading models", "model"):
        model = load_model(folder, settings.dtype_of(name), task.auto_class)
        sides[name] = Side(model, tokenizer)
        if vocabulary_size(sides[name]) != vocabulary_size(sides["base"]):
            sides[name] = Side(model, load_tokenizer(folder))
        task.configure_(model, sides[name].tokenizer)
    return measure_models(task, sides, held_out, data, settings)


def _peak_memory(task_name: str, folder: str, data: DataConfig, settings: EvaluationConfig, dtype: torch.dtype) -> int:
    task = TASKS[task_name]
    model = load_model(folder, dtype, task.auto_class)
    task.configure_(model, load_tokenizer(folder))
    with torch.inference_mode():
        model(**task.memory_input(data, settings))
    return peak_rss_bytes()


def _training_speed(base: str, texts: Dataset, recipe: Recipe) -> dict[str, dict]:
    task = TASKS[recipe.task]
    configs: list[SlimConfig] = list(recipe.techniques.values())
    model, tokenizer = load_model(base, auto_class=task.auto_class), load_tokenizer(base)
    task.configure_(model, tokenizer)
    size = recipe.training.get("per_device_train_batch_size", 8)
    seed = recipe.training.get("seed", TrainingArguments.seed)  # a stored teacher has only the examples of the run
    examples = task.examples(texts, tokenizer, model.config.label2id, recipe.data, size, seed)
    batch = task.collator(tokenizer)([examples[i % len(examples)] for i in range(size)])
    shape = recipe.student  # the time does not depend on which layers are kept
    student = make_student(model, replace(shape, choose="even") if shape.keep else shape) if shape else None
    timing = StepTiming(recipe.training, batch, recipe.evaluation.training_repeats)
    return training_speed(task, model, configs, timing, student)
