"""Measurements on saved models, each loaded from disk in a fresh process: what is measured is what a user gets."""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimError
from hf_slim.data import DataConfig, load_texts
from hf_slim.evaluation.compare import measure_models, vocabulary_size
from hf_slim.evaluation.config import EvaluationConfig
from hf_slim.evaluation.footprint import disk_bytes, peak_rss_bytes
from hf_slim.evaluation.tasks.task import TASKS, Side
from hf_slim.evaluation.training_speed import training_speed
from hf_slim.integration.loading import has_head, load_config, load_model, load_tokenizer
from hf_slim.progress import progress
from hf_slim.recipe import Recipe
from hf_slim.student import make_student

Measures = dict[str, Any]


def compare(task: str, base: str, result: str, data: DataConfig, settings: EvaluationConfig) -> dict[str, Measures]:
    """Quality, memory, compute and inference speed of two models, timed in turn.

    Args:
        task: A name in `TASKS`.
        base: The model that the other one came from: a folder, a Hub id, or `package:<module>/<file>`.
        result: The compressed model.
    Returns: `{"base": measures, "result": measures}`; quality is that on the same held-out text.
    """
    with tempfile.TemporaryDirectory(prefix="hf_slim-") as scratch:
        folders = {
            "base": _as_folder(task, base, Path(scratch) / "base"),
            "result": _as_folder(task, result, Path(scratch) / "result"),
        }
        measured = in_fresh_process(_side_by_side, task, folders, data, settings)
        for name, folder in progress(folders.items(), "measuring peak memory", "model"):
            peak = in_fresh_process(_peak_memory, task, folder, data, settings, settings.dtype_of(name))
            measured[name]["memory"] |= {"disk_bytes": disk_bytes(folder), "peak_rss_bytes": peak}
    return measured


def task_of(spec: str) -> str:
    """The task that a saved model has a head for; causal-lm where its files do not say."""
    config = load_config(spec)
    return next((name for name in TASKS if has_head(config, TASKS[name].auto_class)), "causal-lm")


def training_step_ms(base: str, recipe: Recipe) -> dict[str, dict]:
    """Milliseconds of a plain training step ("base") and of one with the recipe's callbacks ("result")."""
    return in_fresh_process(_training_speed, base, recipe)


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """The result of a module-level function, computed in a new Python process that ends afterwards."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=quiet_libraries) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise SlimError(
                "A process that measures was ended from outside, most likely for want of memory. A model that was "
                "trained is saved: free some memory, then measure it with `hf-slim eval`."
            ) from error


def quiet_libraries() -> None:
    """Leaves the terminal to hf_slim's own progress bars."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _as_folder(task: str, spec: str, scratch: Path) -> str:
    """The folder of a saved model; any other model is first saved to `scratch`."""
    if Path(spec).is_dir():
        return spec
    load_model(spec, auto_class=TASKS[task].auto_class).save_pretrained(scratch)
    load_tokenizer(spec).save_pretrained(scratch)
    return str(scratch)


def _side_by_side(
    task_name: str, folders: dict[str, str], data: DataConfig, settings: EvaluationConfig
) -> dict[str, Measures]:
    task = TASKS[task_name]
    _, held_out = load_texts(data, task.columns(data))
    tokenizer = load_tokenizer(folders["base"])
    sides = {}
    for name, folder in progress(folders.items(), "loading models", "model"):
        model = load_model(folder, settings.dtype_of(name), task.auto_class)
        sides[name] = Side(model, tokenizer)
        if vocabulary_size(sides[name]) != vocabulary_size(sides["base"]):
            sides[name] = Side(model, load_tokenizer(folder))
        task.settle_(model, sides[name].tokenizer)
    return measure_models(task, sides, held_out, data, settings)


def _peak_memory(task_name: str, folder: str, data: DataConfig, settings: EvaluationConfig, dtype: torch.dtype) -> int:
    task = TASKS[task_name]
    model = load_model(folder, dtype, task.auto_class)
    task.settle_(model, load_tokenizer(folder))
    with torch.inference_mode():
        model(**task.memory_input(data, settings))
    return peak_rss_bytes()


def _training_speed(base: str, recipe: Recipe) -> dict[str, dict]:
    task = TASKS[recipe.task]
    configs: list[SlimConfig] = list(recipe.techniques.values())
    texts, _ = load_texts(recipe.data, task.columns(recipe.data))
    model, tokenizer = load_model(base, auto_class=task.auto_class), load_tokenizer(base)
    task.settle_(model, tokenizer)
    size = recipe.training.get("per_device_train_batch_size", 8)
    seed = recipe.training.get("seed", TrainingArguments.seed)  # examples of the run: a stored teacher knows no others
    examples = task.examples(texts, tokenizer, model.config.label2id, recipe.data, size, seed)
    batch = task.collator(tokenizer)([examples[i % len(examples)] for i in range(size)])
    shape = recipe.student  # which layers stay does not change the time
    student = make_student(model, replace(shape, choose="even") if shape.keep else shape) if shape else None
    return training_speed(task, model, configs, recipe.training, batch, recipe.evaluation.training_repeats, student)
