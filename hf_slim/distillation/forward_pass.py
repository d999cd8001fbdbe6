"""The state that is kept from the start to the end of one forward pass of the student."""

from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import Tensor

from hf_slim.distillation.capture.attention_states import AttentionState
from hf_slim.distillation.capture.output_layer import BackboneCapture, HeadCapture
from hf_slim.distillation.targets import Targets
from hf_slim.distillation.teachers.live import TeacherOutput


@dataclass
class ForwardPass:
    """State of one forward pass of the student.

    Attributes:
        targets: Labels and their count.
        computes_task: Whether the task loss is computed from the labels together with the divergences.
        trainer_computes_task: Whether the trainer computes the task loss. A loss that the model itself returns is then
            not used.
        skips_logits: Whether the model's own logits are not needed, so that its output layer runs on one position.
        alpha: Weight of the teacher's terms, in [0, 1].
        teacher_outputs: One per teacher.
        contexts: Context managers that are open until the forward pass ends.
        capture: The input of the output layer; None where the model's logits are used.
        attention: Attention states of the student, one per compared layer; filled when `contexts` close.
        hidden_mask: `(batch, length)` of the tokens whose hidden states are compared; None: all.
        read_mask: `(batch, length)` of the tokens that the model, or its encoder, reads; None: all.
        returns_hidden: Whether the caller requested hidden states.
    """

    targets: Targets
    computes_task: bool
    trainer_computes_task: bool
    skips_logits: bool
    alpha: float
    teacher_outputs: list[TeacherOutput] = field(default_factory=list)
    contexts: ExitStack = field(default_factory=ExitStack)
    capture: HeadCapture | BackboneCapture | None = None
    attention: list[AttentionState] = field(default_factory=list)
    hidden_mask: Tensor | None = None
    read_mask: Tensor | None = None
    returns_hidden: bool = False

    def abandon(self) -> None:
        """Restore the model after a forward pass that failed."""
        self.contexts.__exit__(RuntimeError, RuntimeError("the forward pass failed"), None)
