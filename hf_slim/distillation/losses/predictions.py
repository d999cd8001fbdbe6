"""A teacher's predictions for one micro-batch, computed a few rows at a time so that the full logits never exist."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_slim.core.errors import SlimError
from hf_slim.distillation.losses.divergences import Distribution, TopK


class Predictions(Protocol):
    """A teacher's predictions for one micro-batch.

    Attributes:
        n_classes: Size of the teacher's vocabulary or label set.
    """

    n_classes: int | None

    def at(self, rows: Tensor) -> "Predictions":
        """Predictions at some positions of the flattened batch, computed when this is called.

        Args:
            rows: `(n_rows,)`, positions in `[0, batch * length)`.
        """

    def distribution(self, rows: slice, temperature: float) -> Distribution | TopK:
        """Probabilities of the classes for some rows of what `at` has returned."""


@dataclass(frozen=True)
class LogitPredictions:
    """Predictions of a model that has run on this micro-batch.

    Attributes:
        states: `(positions, width)`, the input of the output layer; or the logits, `(positions, n_classes)`.
        head: The output layer; None if `states` are logits.
        n_classes: Columns of the logits.
        autocast_dtype: Autocast precision of the output layer; None: no autocast.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor] | None
    n_classes: int | None
    autocast_dtype: torch.dtype | None = None

    @torch.no_grad()
    def at(self, rows: Tensor) -> "LogitPredictions":
        """Logits at some positions; runs the output layer on them."""
        logits = self.states[rows]
        if self.head is not None:
            with torch.autocast(logits.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                logits = self.head(logits)
        return LogitPredictions(logits, None, self.n_classes)

    @torch.no_grad()
    def distribution(self, rows: slice, temperature: float) -> Distribution:
        """Softmax of the logits divided by the temperature.

        Raises: SlimError: if a logit of the teacher is NaN or infinite.
        """
        found = Distribution.of_logits(self.states[rows], temperature)
        if torch.isnan(found.log[:, 0]).any():  # one NaN or infinite logit makes all of its row NaN
            raise SlimError(
                "The teacher's logits contain NaN or infinity. Check its checkpoint, or run it in a wider dtype than "
                "fp16."
            )
        return found


@dataclass(frozen=True)
class StoredPredictions:
    """Predictions that were stored at one temperature, limited to the most probable classes.

    Attributes:
        stored: One row per position, or per example.
        n_classes: Size of the teacher's vocabulary or label set.
    """

    stored: TopK
    n_classes: int | None

    def at(self, rows: Tensor) -> "StoredPredictions":
        """Predictions at some positions."""
        return StoredPredictions(self.stored[rows], self.n_classes)

    def distribution(self, rows: slice, temperature: float) -> TopK:
        """Return the stored probabilities; `StoredTeacher.check` has compared the temperature."""
        return self.stored[rows]


@dataclass(frozen=True)
class MixedPredictions:
    """Weighted mean of the probabilities of several teachers.

    Attributes:
        parts: One per teacher, none of them stored.
        weights: One per teacher; their sum is 1.
    """

    parts: Sequence[Predictions]
    weights: Sequence[float]

    @property
    def n_classes(self) -> int | None:
        """Classes of the first teacher; `check_teacher` has compared each teacher's with the student's."""
        return self.parts[0].n_classes

    def at(self, rows: Tensor) -> "MixedPredictions":
        """Predictions of every teacher at some positions; runs their output layers."""
        return MixedPredictions([part.at(rows) for part in self.parts], self.weights)

    def distribution(self, rows: slice, temperature: float) -> Distribution:
        """Mean of the probabilities, not of their logarithms."""
        found = [part.distribution(rows, temperature).probabilities for part in self.parts]
        mean = sum(weight * one for weight, one in zip(self.weights, found, strict=True))
        return Distribution(mean.clamp_min_(torch.finfo(mean.dtype).tiny).log_())
