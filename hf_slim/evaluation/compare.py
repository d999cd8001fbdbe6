"""Measures a base model and its compressed form side by side."""

import logging
from typing import Any

from datasets import Dataset

from hf_slim.core.errors import SlimError
from hf_slim.data import DataConfig
from hf_slim.evaluation.config import EvaluationConfig
from hf_slim.evaluation.footprint import (
    attention_multiply_adds_per_token,
    multiply_adds_per_token,
    parameter_count,
    ram_bytes,
)
from hf_slim.evaluation.tasks.task import Side, Task

logger = logging.getLogger(__name__)

SEED_OF_HELD_OUT = 0  # the held-out examples do not depend on the training seed


def measure_models(
    task: Task, sides: dict[str, Side], held_out: Dataset, data: DataConfig, settings: EvaluationConfig
) -> dict[str, dict[str, Any]]:
    """Quality, memory, compute and inference speed of each side: name -> measures.

    Args:
        sides: Name -> model and tokenizer; they are timed in turn.
        held_out: The same texts for all sides; each side tokenizes them with its own tokenizer.
    Raises: SlimError: if the sides split the texts into different tokens.
    """
    count = task.held_out(settings)
    examples = {
        name: task.examples(held_out, side.tokenizer, side.model.config.label2id, data, count, SEED_OF_HELD_OUT)
        for name, side in sides.items()
    }
    check_same_tokens(sides, examples)
    measured = task.measure(sides, examples, data, settings)
    length = task.memory_input(data, settings)["input_ids"].shape[1]
    return {name: measured[name] | _size(side, length) for name, side in sides.items()}


def vocabulary_size(side: Side) -> int:
    """Number of rows of the model's vocabulary."""
    return side.model.config.get_text_config().vocab_size


def check_same_tokens(sides: dict[str, Side], examples: dict[str, Dataset]) -> None:
    """Raises SlimError if the tokens of the sides have different names, since their losses cannot be compared then.

    Ids may differ, as after `shrink-vocabulary`.
    """
    (name, first), *others = sides.items()
    for other, side in others:
        if side.tokenizer is first.tokenizer:
            continue
        for mine, theirs in zip(examples[name]["input_ids"], examples[other]["input_ids"], strict=True):
            if first.tokenizer.convert_ids_to_tokens(mine) != side.tokenizer.convert_ids_to_tokens(theirs):
                raise SlimError(
                    f"The models have vocabularies of {vocabulary_size(first)} and {vocabulary_size(side)} tokens and "
                    "split the held-out text in different ways, so their perplexities cannot be compared. Use a base "
                    "model whose tokenizer splits text in the same way as that of the result."
                )


def _size(side: Side, length: int) -> dict[str, Any]:
    return {
        "dtype": str(side.model.dtype).removeprefix("torch."),
        "memory": {"ram_bytes": ram_bytes(side.model)},
        "compute": {
            "parameters": parameter_count(side.model),
            **_multiply_adds(side, length),
            "vocabulary": vocabulary_size(side),
        },
    }


def _multiply_adds(side: Side, length: int) -> dict[str, float]:
    try:
        counts: dict[str, float] = {"multiply_adds_per_token": multiply_adds_per_token(side.model)}
        attention = attention_multiply_adds_per_token(side.model, length)
    except SlimError as error:  # a failed count must not stop the other measurements of a run
        logger.warning("%s", error)
        return {}
    if attention:  # attention kernels of other libraries than torch are not counted
        counts |= {"attention_multiply_adds_per_token": attention, "attention_length": length}
    return counts
