"""The registry of tasks that a recipe can train a model for. Each task has a separate file."""

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
    """A model that is measured, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """How models of one task are loaded, trained and measured.

    Attributes:
        auto_class: Loads a model with the task's head.
        loss_counts_items: Whether the model divides its loss by the Trainer's count of predictions. If it does not,
            the Trainer must not count them either, or gradients become too large with gradient accumulation.
        columns: The columns of the data that the task reads. Raises SlimError for settings that do not fit it.
        label_names: Names of the classes in a split, in the order of their ids; None for a task without classes.
            Raises SlimError for values that cannot be classes.
        configure_: Sets on model and tokenizer what batches need, such as the padding token, before training.
        examples: `(texts, tokenizer, label2id, data, count, seed)` -> up to `count` tokenized, shuffled examples.
        collator: Makes one batch of a list of examples.
        held_out: Number of examples on which quality is measured.
        measure: Quality and inference speed of every side, on examples made from the same texts.
        memory_input: Inputs of the forward pass in which peak memory is measured.
    """

    auto_class: type
    loss_counts_items: bool
    columns: Callable[[DataConfig], list[str]]
    label_names: Callable[[Dataset, DataConfig], list[str] | None]
    configure_: Callable[[PreTrainedModel, PreTrainedTokenizerBase], None]
    examples: Callable[[Dataset, PreTrainedTokenizerBase, dict[str, int], DataConfig, int, int], Dataset]
    collator: Callable[[PreTrainedTokenizerBase], Callable[[list[dict]], dict[str, Tensor]]]
    held_out: Callable[[EvaluationConfig], int]
    measure: Callable[[dict[str, Side], dict[str, Dataset], DataConfig, EvaluationConfig], dict[str, Measures]]
    memory_input: Callable[[DataConfig, EvaluationConfig], dict[str, Any]]


TASKS: Registry[Task] = Registry("task")
