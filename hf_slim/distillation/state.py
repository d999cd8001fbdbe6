"""The state of a distillation run, in one object."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hf_slim.core.contracts import PreparedHook
from hf_slim.distillation.forward_pass import ForwardPass
from hf_slim.distillation.objective import Objective
from hf_slim.distillation.targets import Targets


@dataclass
class DistillationState(PreparedHook):
    """State of one run. A model has exactly one: `core.record.state_of(model, DistillationState)`.

    Attributes:
        run: The Trainer's state, which says at which step the training is; None before a Trainer is built.
        is_attached: Whether the trainer's `compute_loss` adds the teacher's term.
        hooks: Forward hooks on the student.
        forward_pass: The forward pass that is running; None between two passes.
        targets: Labels of the micro-batch, saved before the forward pass of an attached trainer, which may not pass
            them to the model.
        objective: Loss of the last forward pass, until an attached trainer uses it.
        reached_backward: Whether a gradient of the teacher's term has been computed at least once.
        counts_items: Whether terms are normalised over the whole accumulated batch.
        sums: Name -> sum of a loss over the micro-batches since the last log.
        steps: Optimizer steps since the last log.
        micro_step: Index of the micro-batch within the optimizer step, from 0.
    """

    run: Any = None
    is_attached: bool = False
    hooks: list[RemovableHandle] = field(default_factory=list)
    forward_pass: ForwardPass | None = None
    targets: Targets | None = None
    objective: Objective | None = None
    reached_backward: bool = False
    counts_items: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    micro_step: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "DistillationState":
        """Start with an empty state, because a copy of a student takes part in no run."""
        return DistillationState()

    @property
    def progress(self) -> float:
        """Share of the optimizer steps that are done, in [0, 1]."""
        return self.run.global_step / max(self.run.max_steps, 1)

    def unhook(self) -> None:
        """Remove the forward hooks from the student."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def add(self, name: str, value: Tensor) -> None:
        """Add a micro-batch's share of a loss to the sums of the next log.

        Args:
            name: Of the loss.
            value: A scalar.
        """
        self.sums[name] = self.sums.get(name, 0) + value.detach().clone()  # the Trainer scales losses in place

    def keep_targets(self, labels: Tensor | None, is_shifted: bool, items_in_batch: Tensor | int | None) -> None:
        """Save the labels of a micro-batch, because an attached trainer may not pass them to the model.

        Args:
            labels: As `Targets.labels`; None: the model receives them, or there are none.
            is_shifted: Whether position `i` predicts label `i + 1`.
            items_in_batch: Predictions in the whole accumulated batch; None: each micro-batch is a mean.
        """
        self.objective = None
        if labels is not None:
            self.targets = Targets(labels, is_shifted, items_in_batch)

    def take_objective(self) -> Objective | None:
        """Return and clear the loss since `keep_targets`; None if there was no forward pass in training mode."""
        objective, self.objective, self.targets = self.objective, None, None
        return objective

    def take_means(self, scale: float) -> dict[str, float]:
        """Mean of every loss per optimizer step since the last log, times `scale`; the sums are reset to zero."""
        means = {name: value.item() * scale / self.steps for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means
