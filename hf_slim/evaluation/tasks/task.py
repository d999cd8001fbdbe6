"""What a recipe may train a model for. Each task is one entry here, in a file of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.registry import Registry
from hf_slim.data import DataConfig
from hf_slim.evaluation.config import EvaluationConfig

Measures = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """A model that is measured, with the tokenizer that reads for it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """How models of one task are loaded, fed and judged.

    Attributes:
        auto_class: Loads a model with the task's head.
        loss_counts_items: Whether the model divides its loss by the Trainer's count of predictions; where it does
            not, the Trainer must not count either, or gradients grow with accumulation.
        columns: The columns of the data that the task reads. Raises SlimError for settings that do not fit it.
        label_names: Names of the classes in a split, in the order of their ids; None where the vocabulary is the
            label set. Raises SlimError for labels that are no classes.
        settle_: Gives model and tokenizer what batches need, before training.
        examples: `(texts, tokenizer, label2id, data, count, seed)` -> up to `count` tokenized, shuffled examples.
        collator: Makes one batch of a list of examples.
        held_out: How many examples the quality is measured on.
        measure: Quality and inference speed of every side, on examples that are one and the same text for all.
        memory_input: What a model is run on while its peak memory is taken.
    """

    auto_class: type
    loss_counts_items: bool
    columns: Callable[[DataConfig], list[str]]
    label_names: Callable[[Dataset, DataConfig], list[str] | None]
    settle_: Callable[[PreTrainedModel, PreTrainedTokenizerBase], None]
    examples: Callable[[Dataset, PreTrainedTokenizerBase, dict[str, int], DataConfig, int, int], Dataset]
    collator: Callable[[PreTrainedTokenizerBase], Callable[[list[dict]], dict[str, Tensor]]]
    held_out: Callable[[EvaluationConfig], int]
    measure: Callable[[dict[str, Side], dict[str, Dataset], DataConfig, EvaluationConfig], dict[str, Measures]]
    memory_input: Callable[[DataConfig, EvaluationConfig], dict[str, Any]]


TASKS: Registry[Task] = Registry("task")
