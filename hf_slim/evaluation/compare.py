"""A base model and its compressed form, measured side by side in one process."""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimError
from hf_slim.evaluation.data import DataConfig, load_texts, text_blocks
from hf_slim.evaluation.footprint import (
    disk_bytes,
    multiply_adds_per_token,
    parameter_count,
    peak_rss_bytes,
    ram_bytes,
)
from hf_slim.evaluation.latency import inference_speed
from hf_slim.evaluation.quality import complete, perplexity
from hf_slim.integration.loading import load_model, load_tokenizer

SEED_OF_HELD_OUT = 0  # the same held-out blocks in every run, whatever the training seed


@dataclass(frozen=True)
class EvaluationConfig(SlimConfig):
    """How much to measure."""

    blocks: int = field(default=32, metadata={"help": "Held-out blocks that perplexity is measured on."})
    prefill_tokens: int = field(default=256, metadata={"help": "Length of the prompt that is timed."})
    decode_tokens: int = field(default=32, metadata={"help": "Tokens that are decoded after it, one at a time."})
    repeats: int = field(default=7, metadata={"help": "Timed rounds; medians need at least 5."})
    training_repeats: int = field(default=5, metadata={"help": "Timed training steps of each kind."})
    prompt: str = field(default="def read_json(path):\n", metadata={"help": "Both models complete this."})

    def __post_init__(self) -> None:
        for name in ("blocks", "prefill_tokens", "decode_tokens", "repeats", "training_repeats"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SlimError(f"`{name}` must be a whole number of at least 1, got {value!r}.")


def in_fresh_process(function: Callable, *args: Any) -> Any:
    """The result of a module-level function, computed in a new Python process that ends afterwards."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def compare_specs(base: str, result: str, data: DataConfig, settings: EvaluationConfig) -> dict[str, Any]:
    """`compare` for models by any name; one that is not a folder is first saved to a temporary one."""
    with tempfile.TemporaryDirectory(prefix="hf_slim-") as scratch:
        folders = []
        for name, spec in (("base", base), ("result", result)):
            folder = Path(spec)
            if not folder.is_dir():
                folder = Path(scratch) / name
                load_model(spec).save_pretrained(folder)
                load_tokenizer(spec).save_pretrained(folder)
            folders.append(str(folder))
        return compare(*folders, data, settings)


def compare(base: str, result: str, data: DataConfig, settings: EvaluationConfig) -> dict[str, Any]:
    """Quality, memory, compute and inference speed of two saved models.

    Loads both from disk in fresh processes, so that what is measured is what a user gets.

    Args:
        base: Folder of the model that the other one came from.
        result: Folder of the compressed model.
    Returns: `{"base": measures, "result": measures, "prompt": str}`; perplexity is over the same held-out blocks.
    """
    measured = in_fresh_process(measure_side_by_side, {"base": base, "result": result}, data, settings)
    for name, folder in (("base", base), ("result", result)):
        measured[name]["memory"]["peak_rss_bytes"] = in_fresh_process(peak_rss_bytes, folder, settings.prefill_tokens)
    return measured


def measure_side_by_side(folders: dict[str, str], data: DataConfig, settings: EvaluationConfig) -> dict[str, Any]:
    """All measures that can share a process: name -> measures, and the prompt that was completed."""
    tokenizer = load_tokenizer(folders["base"])
    _, held_out = load_texts(data)
    blocks = text_blocks(held_out, tokenizer, data, settings.blocks, SEED_OF_HELD_OUT, "reading held-out text")
    models = {name: load_model(folder) for name, folder in folders.items()}
    ids = [token for example in blocks for token in example["input_ids"]][: settings.prefill_tokens]
    speed = inference_speed(models, torch.tensor([ids]), settings.decode_tokens, settings.repeats)
    measured: dict[str, Any] = {"prompt": settings.prompt}
    for name, model in models.items():
        measured[name] = {
            "quality": {"perplexity": perplexity(model, blocks, f"perplexity of {name}"), "blocks": len(blocks)},
            "memory": {"disk_bytes": disk_bytes(folders[name]), "ram_bytes": ram_bytes(model)},
            "compute": {
                "parameters": parameter_count(model),
                "multiply_adds_per_token": multiply_adds_per_token(model),
            },
            "inference": speed[name],
            "completion": complete(model, tokenizer, settings.prompt),
        }
    return measured
