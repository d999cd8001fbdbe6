"""Everything that a run of distillation knows about its student, in one object."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hf_slim.core.contracts import PreparedHook
from hf_slim.distillation.distiller import Pass
from hf_slim.distillation.objective import Objective
from hf_slim.distillation.targets import Targets


@dataclass
class DistillationState(PreparedHook):
    """The state of a run; `core.record.state_of(model, DistillationState)` is the only one there is of a model.

    Attributes:
        run: The Trainer's state while it trains this student: which step it is at.
        is_attached: Whether the trainer computes the task loss, and adds the teacher's term itself.
        hooks: Forward hooks on the student.
        forward: What is known while the student's forward pass runs; None between two passes.
        targets: Labels that an attached trainer keeps from the model, noted before the forward pass.
        objective: The loss of the last forward pass, for an attached trainer to take.
        reached_backward: Whether the teacher's term has ever reached the backward pass.
        counts_items: Whether terms are normalised over the whole accumulated batch.
        sums: Name -> sum of a loss over the micro-batches since the last log.
        steps: Optimizer steps since the last log.
        micro_step: Micro-batches done within the optimizer step.
    """

    run: Any = None
    is_attached: bool = False
    hooks: list[RemovableHandle] = field(default_factory=list)
    forward: Pass | None = None
    targets: Targets | None = None
    objective: Objective | None = None
    reached_backward: bool = False
    counts_items: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    micro_step: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "DistillationState":
        """A copy of a student is not taught."""
        return DistillationState()

    @property
    def progress(self) -> float:
        """Share of training that is done, in [0, 1]."""
        return self.run.global_step / max(self.run.max_steps, 1)

    def unhook(self) -> None:
        """Removes the forward hooks from the student."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def add(self, name: str, value: Tensor) -> None:
        """Adds a micro-batch's share of a loss to what the next log shows."""
        self.sums[name] = self.sums.get(name, 0) + value.detach().clone()  # the Trainer scales losses in place

    def keep_targets(self, labels: Tensor | None, is_shifted: bool, items_in_batch: Tensor | int | None) -> None:
        """Notes what an attached trainer is about to train on, because the model may not be given it."""
        self.objective = None
        if labels is not None:
            self.targets = Targets(labels, is_shifted, items_in_batch)

    def take_objective(self) -> Objective | None:
        """The loss of the forward pass since `keep_targets`; None if the model did not train in it."""
        objective, self.objective, self.targets = self.objective, None, None
        return objective

    def take_means(self, scale: float) -> dict[str, float]:
        """Mean of every loss per optimizer step since the last log, times `scale`; begins the next count."""
        means = {name: value.item() * scale / self.steps for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means
