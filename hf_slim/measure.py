"""Measurements on saved models, each loaded from disk in a fresh process: what is measured is what a user gets."""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimError
from hf_slim.evaluation.compare import EvaluationConfig, measure_models
from hf_slim.evaluation.data import DataConfig, load_texts, text_blocks
from hf_slim.evaluation.footprint import disk_bytes, peak_rss_bytes
from hf_slim.evaluation.training_speed import training_speed
from hf_slim.integration.loading import load_model, load_tokenizer
from hf_slim.recipe import Recipe

SEED_OF_HELD_OUT = 0  # the same held-out blocks in every run, whatever the training seed
Measures = dict[str, Any]


def compare(base: str, result: str, data: DataConfig, settings: EvaluationConfig) -> dict[str, Measures]:
    """Quality, memory, compute and inference speed of two models, timed in turn.

    Args:
        base: The model that the other one came from: a folder, a Hub id, or `package:<module>/<file>`.
        result: The compressed model.
    Returns: `{"base": measures, "result": measures}`; perplexity is over the same held-out blocks.
    """
    with tempfile.TemporaryDirectory(prefix="hf_slim-") as scratch:
        folders = {
            "base": _as_folder(base, Path(scratch) / "base"),
            "result": _as_folder(result, Path(scratch) / "result"),
        }
        measured = in_fresh_process(_side_by_side, folders, data, settings)
        for name, folder in tqdm(folders.items(), desc="peak memory", unit="model"):
            peak = in_fresh_process(_peak_memory, folder, settings.prefill_tokens, settings.dtype_of(name))
            measured[name]["memory"] |= {"disk_bytes": disk_bytes(folder), "peak_rss_bytes": peak}
    return measured


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


def _as_folder(spec: str, scratch: Path) -> str:
    """The folder of a saved model; any other model is first saved to `scratch`."""
    if Path(spec).is_dir():
        return spec
    load_model(spec).save_pretrained(scratch)
    load_tokenizer(spec).save_pretrained(scratch)
    return str(scratch)


def _side_by_side(folders: dict[str, str], data: DataConfig, settings: EvaluationConfig) -> dict[str, Measures]:
    tokenizer = load_tokenizer(folders["base"])
    _, held_out = load_texts(data)
    blocks = text_blocks(held_out, tokenizer, data, settings.blocks, SEED_OF_HELD_OUT, "reading held-out text")
    named = tqdm(folders.items(), desc="loading", unit="model")
    models = {name: load_model(folder, settings.dtype_of(name)) for name, folder in named}
    check_vocabularies(models)
    return measure_models(models, tokenizer, blocks, settings)


def check_vocabularies(models: dict[str, PreTrainedModel]) -> None:
    """Raises SlimError if token ids do not mean the same to both models, as after `shrink-vocabulary`."""
    base, result = (models[name].config.get_text_config().vocab_size for name in ("base", "result"))
    if base != result:
        raise SlimError(
            f"A vocabulary of {base} tokens against one of {result}: perplexities over different tokens do not "
            "compare. Give as base a model with the vocabulary of the result, such as what `shrink-vocabulary` wrote."
        )


def _peak_memory(folder: str, n_tokens: int, dtype: torch.dtype) -> int:
    model = load_model(folder, dtype)
    with torch.inference_mode():
        model(input_ids=torch.ones(1, n_tokens, dtype=torch.long), logits_to_keep=1)
    return peak_rss_bytes()


def _training_speed(base: str, recipe: Recipe) -> dict[str, dict]:
    configs: list[SlimConfig] = list(recipe.techniques.values())
    texts, _ = load_texts(recipe.data)
    n_blocks = recipe.training.get("per_device_train_batch_size", 8)
    blocks = text_blocks(texts, load_tokenizer(base), recipe.data, n_blocks, SEED_OF_HELD_OUT, "reading text")
    return training_speed(load_model(base), configs, recipe.training, blocks, recipe.evaluation.training_repeats)
