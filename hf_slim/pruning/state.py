"""Everything that a run of pruning knows about one model, in one object."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_slim.pruning.budget.plan import Plan
from hf_slim.pruning.removal.cut import Removed


@dataclass
class PruningState:
    """The state of a run; `core.record.state_of(model, PruningState)` is the only one there is of a model.

    Attributes:
        plan: What pruning found in the model and is going to remove, found once; None before.
        removed: Group set name -> indices of the groups that are masked and wait for removal.
        scores: Group set name -> `(count,)`, running mean of the importance of its groups.
        sizes: Fields of the model's config that would say what was removed, with their new values.
    """

    plan: Plan | None = None
    removed: Removed = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def timings(self) -> dict[str, Any] | None:
        """What was measured for a target in time, on the device of the first process."""
        return None if self.plan is None else self.plan.timings

    @property
    def groups_removed(self) -> int:
        """Groups that are masked now."""
        return sum(map(len, self.removed.values()))

    def sparsity(self) -> float:
        """Share of the groups of the plan that are masked now, in [0, 1]."""
        return self.groups_removed / max(1, sum(found.count for found in self.plan.group_sets))

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint must hold in addition to the weights."""
        scores = {name: torch.as_tensor(score).tolist() for name, score in self.scores.items()}
        return {"removed": self.removed, "timings": self.timings, "scores": scores}

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over what `to_json` wrote; the plan is computed again."""
        self.removed = saved["removed"]
        self.scores = {name: torch.tensor(score) for name, score in saved["scores"].items()}
