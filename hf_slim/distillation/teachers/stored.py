"""A teacher whose predictions are read from disk: used like one in memory, without loading a model."""

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from torch import nn

from hf_slim.core.errors import SlimConfigError
from hf_slim.core.host import method_or_none
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.losses.divergences import TopK
from hf_slim.distillation.losses.predictions import StoredPredictions
from hf_slim.distillation.store.format import tokenizer_hash
from hf_slim.distillation.store.reader import StoredTeacher
from hf_slim.distillation.teachers.live import TeacherOutput, TeacherRequest


class DiskTeacher:
    """Predictions from a folder that `hf-slim cache-teacher` has written.

    Args:
        folder: Folder of the store.
        student: Its vocabulary or label set must be that of the store.
        tokenizer: Tokenizer of the data; not compared if it is None or, such as an image processor, no tokenizer.
        config: Temperature and losses of the run.
    Raises: SlimConfigError: if the store is not complete, or does not fit student, tokenizer or config.
    """

    model: nn.Module | None = None
    is_student = is_busy = False

    def __init__(
        self, folder: str | Path, student: nn.Module, tokenizer: Any,
        config: DistillationConfig,
    ):  # fmt: skip
        if config.hidden or config.attention or config.on_policy:
            raise SlimConfigError(
                f"'{folder}' contains predictions only. Remove `hidden`, `attention` and `on_policy`, or name a model "
                "as the teacher."
            )
        self.store = StoredTeacher.open(folder)
        sizes = student.config.num_labels if self.store.info.per == "example" else student.config.vocab_size
        is_tokenizer = method_or_none(tokenizer, "get_vocab") is not None
        self.store.check(sizes, tokenizer_hash(tokenizer) if is_tokenizer else None, config.temperature)

    def check_data(self, dataset: Any) -> None:
        """Check that a tokenized dataset is stored; a dataset without a length or `input_ids` is not checked.

        Args:
            dataset: The training data.
        Raises: SlimConfigError: at the first row that is not in the store.
        """
        if isinstance(dataset, Sized) and len(dataset) and "input_ids" in dataset[0]:
            self.store.check_data(dataset)

    def forward(self, inputs: Mapping[str, Any], request: TeacherRequest) -> TeacherOutput:
        """Look the predictions up by the content of the examples.

        Args:
            inputs: Keyword arguments of the student.
            request: Not used: a store contains predictions only.
        Raises: SlimConfigError: if an example is not in the store.
        """
        return TeacherOutput(StoredPredictions(TopK(*self.store.top_k(inputs)), self.store.info.n_classes))
