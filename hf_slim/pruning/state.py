"""The state of a pruning run for one model, in one object."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_slim.pruning.budget.plan import Plan
from hf_slim.pruning.removal.cut import Removed


@dataclass
class PruningState:
    """The state of a run. A model has one: `core.record.state_of(model, PruningState)`.

    Attributes:
        plan: The groups of the model and the amounts to remove; None before planning.
        removed: Group set name -> indices of the groups that are masked, and removed at the end.
        scores: Group set name -> `(count,)`, running mean of the importance of its groups.
        sizes: Fields of the model's config that describe the removal, with their new values.
    """

    plan: Plan | None = None
    removed: Removed = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def timings(self) -> dict[str, Any] | None:
        """The measured times for a latency target, from the device of the first process."""
        return None if self.plan is None else self.plan.timings

    @property
    def groups_removed(self) -> int:
        """Number of groups that are masked now."""
        return sum(map(len, self.removed.values()))

    def sparsity(self) -> float:
        """Share of the groups of the plan that are masked now, in [0, 1]."""
        return self.groups_removed / max(1, sum(found.count for found in self.plan.group_sets))

    def to_json(self) -> dict[str, Any]:
        """The state that a checkpoint must have in addition to the weights."""
        scores = {name: torch.as_tensor(score).tolist() for name, score in self.scores.items()}
        return {"removed": self.removed, "timings": self.timings, "scores": scores}

    def restore(self, saved: dict[str, Any]) -> None:
        """Restores the state from `to_json`; the plan is computed again."""
        self.removed = saved["removed"]
        self.scores = {name: torch.tensor(score) for name, score in saved["scores"].items()}
