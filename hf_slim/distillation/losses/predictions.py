"""What a teacher answers, read a few rows at a time, so that its logits never exist all at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_slim.core.errors import SlimError
from hf_slim.distillation.losses.divergences import Distribution, TopK


class Answers(Protocol):
    """A teacher's answers to one micro-batch."""

    n_classes: int | None

    def at(self, rows: Tensor) -> "Answers":
        """Those of some positions of the flattened batch, computed now."""

    def distribution(self, rows: slice, temperature: float) -> Distribution | TopK:
        """Over the classes, of some rows of `at`."""


@dataclass(frozen=True)
class LogitAnswers:
    """Answers of a model that ran just now.

    Attributes:
        states: `(positions, width)`, what enters the output layer; or the logits themselves.
        head: The output layer, or None for logits.
        n_classes: Columns of the logits.
        autocast_dtype: Precision that the layer runs in; None for its own.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor] | None
    n_classes: int | None
    autocast_dtype: torch.dtype | None = None

    @torch.no_grad()
    def at(self, rows: Tensor) -> "LogitAnswers":
        """Runs the output layer."""
        logits = self.states[rows]
        if self.head is not None:
            with torch.autocast(logits.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                logits = self.head(logits)
        return LogitAnswers(logits, None, self.n_classes)

    @torch.no_grad()
    def distribution(self, rows: slice, temperature: float) -> Distribution:
        """Raises SlimError: if the teacher answers NaN."""
        found = Distribution.of_logits(self.states[rows], temperature)
        if torch.isnan(found.log[:, 0]).any():  # one NaN or infinite logit makes all of its row NaN
            raise SlimError("The teacher answers NaN. Check its checkpoint, or run it in a wider dtype than fp16.")
        return found


@dataclass(frozen=True)
class StoredAnswers:
    """Answers that were stored at one temperature, cut to the likeliest classes."""

    stored: TopK
    n_classes: int | None

    def at(self, rows: Tensor) -> "StoredAnswers":
        """Those of some positions."""
        return StoredAnswers(self.stored[rows], self.n_classes)

    def distribution(self, rows: slice, temperature: float) -> TopK:
        """The temperature is that of the store; `StoredTeacher` has compared both."""
        return self.stored[rows]


@dataclass(frozen=True)
class MixedAnswers:
    """The weighted mean of what several teachers think likely.

    Attributes:
        weights: One per teacher; they add up to 1.
    """

    parts: Sequence[Answers]
    weights: Sequence[float]

    @property
    def n_classes(self) -> int | None:
        """Of the first; `check_teacher` has compared them."""
        return self.parts[0].n_classes

    def at(self, rows: Tensor) -> "MixedAnswers":
        """Runs every teacher's output layer."""
        return MixedAnswers([part.at(rows) for part in self.parts], self.weights)

    def distribution(self, rows: slice, temperature: float) -> Distribution:
        """The mean of the probabilities, not of the logarithms."""
        found = [part.distribution(rows, temperature).probabilities for part in self.parts]
        mean = sum(weight * one for weight, one in zip(self.weights, found, strict=True))
        return Distribution(mean.clamp_min_(torch.finfo(mean.dtype).tiny).log_())
