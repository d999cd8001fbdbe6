"""A teacher whose answers were stored before: it is asked like one in memory, and takes none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_slim.core.errors import SlimConfigError
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.losses.answers import StoredAnswers
from hf_slim.distillation.losses.divergences import TopK
from hf_slim.distillation.store.format import tokenizer_hash
from hf_slim.distillation.store.reader import StoredTeacher
from hf_slim.distillation.teachers.live import Question, Taught


class DiskTeacher:
    """Answers from a folder that `hf-slim cache-teacher` wrote.

    Args:
        folder: Of the store.
        student: Whose vocabulary or label set the store must have.
        tokenizer: Of the data; None, or something else that prepares data, is not compared.
    Raises: SlimConfigError: if the store is not complete, or does not fit.
    """

    model: nn.Module | None = None
    is_student = is_busy = False

    def __init__(
        self, folder: str | Path, student: nn.Module, tokenizer: Any,
        config: DistillationConfig,
    ):  # fmt: skip
        if config.hidden or config.attention or config.on_policy:
            raise SlimConfigError(
                f"'{folder}' holds what a teacher answered, and nothing else. Leave out `hidden`, `attention` and "
                "`on_policy`, or name a teacher in memory."
            )
        self.store = StoredTeacher.open(folder)
        sizes = student.config.num_labels if self.store.info.per == "example" else student.config.vocab_size
        is_tokenizer = hasattr(tokenizer, "get_vocab")
        self.store.check(sizes, tokenizer_hash(tokenizer) if is_tokenizer else None, config.temperature)

    def check_data(self, dataset: Any) -> None:
        """Raises SlimConfigError at the first row of a tokenized dataset that is not stored."""
        if hasattr(dataset, "__len__") and len(dataset) and "input_ids" in dataset[0]:
            self.store.check_data(dataset)

    def ask(self, inputs: Mapping[str, Any], question: Question) -> Taught:
        """Looks the examples up by their content. Raises SlimConfigError: if one is not stored."""
        return Taught(StoredAnswers(TopK(*self.store.answers(inputs)), self.store.info.n_classes))
