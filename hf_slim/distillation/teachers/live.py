"""The models that teach: frozen, in evaluation mode, outside of the student's parameters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.adapters import adapters_disabled
from hf_slim.core.errors import SlimError
from hf_slim.core.modules import evaluating, plain_copy
from hf_slim.core.record import unwrapped
from hf_slim.distillation.capture.attention_states import AttentionState, attention_states
from hf_slim.distillation.capture.output_layer import Split, head_tap, output_layer, split_of
from hf_slim.distillation.losses.answers import Answers, LogitAnswers
from hf_slim.distillation.teachers.sharding import gathered, is_partitioned, is_sharded, reshard_, share_out_

NOT_FOR_THE_TEACHER = (
    "labels", "shift_labels", "num_items_in_batch", "return_dict", "use_cache", "logits_to_keep", "fused_lm_head",
    "output_hidden_states", "output_attentions",
)  # fmt: skip


@dataclass(frozen=True)
class Taught:
    """What a teacher says about one micro-batch.

    Attributes:
        answers: Of the output layer; None for a model without one.
        hidden: Layer -> `(batch, length, width)`, the embedding first; empty if nobody asked.
        attention: States of the asked layers.
    """

    answers: Answers | None
    hidden: tuple[Tensor, ...] = ()
    attention: list[AttentionState] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """What is asked of a teacher beside its answers.

    Attributes:
        autocast_dtype: Precision of the run, None for the teacher's own.
        hidden: Whether hidden states are asked for.
        attention: Layers whose attention is asked for.
    """

    autocast_dtype: torch.dtype | None = None
    hidden: bool = False
    attention: Sequence[int] = ()


class LiveTeacher:
    """A model that answers while the student learns.

    Args:
        model: Frozen and in evaluation mode; or the student itself.
        is_student: Whether it is the student, who teaches itself without its adapters: no second copy.
    Raises: SlimError: if the model could change while it teaches.
    """

    def __init__(self, model: nn.Module, is_student: bool = False):
        if not is_student:
            _check_frozen(model)
        self.model, self.is_student = model, is_student
        self.split: Split | None = split_of(model)
        self.is_busy = False  # hooks on the student must not see it teach
        self._keeper: Any = None  # of weights that are shared out

    def share_out_(self, student: nn.Module, deepspeed: dict[str, Any] | None) -> None:
        """Leaves each process its part of the weights, where those of the student are shared out.

        Quantized and offloaded teachers stay as they are: they are small already, or placed by somebody else.

        Args:
            student: As the Trainer has wrapped it.
            deepspeed: The run's configuration of DeepSpeed.
        """
        if not (self._stays_in_place() or getattr(self.model, "is_quantized", False)):
            self._keeper = share_out_(self.model, student, deepspeed)
        if is_partitioned(self.model):
            self.split = None  # its output layer has weights only within its forward pass

    def rest(self) -> None:
        """To be called when its answers to a micro-batch are not needed any more."""
        if not self.is_student:
            reshard_(self.model)

    @torch.no_grad()
    def ask(self, inputs: Mapping[str, Any], question: Question) -> Taught:
        """Its answers to the student's inputs.

        Args:
            inputs: The student's keyword arguments; labels are left out.
        Raises: SlimError: if the text is too long for it, or memory ends.
        """
        inputs = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_TEACHER}
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        dtype = question.autocast_dtype
        _check_length(self.model, inputs)
        try:
            self._move_to(device)
            with ExitStack() as stack:
                stack.enter_context(self._teaching())
                stack.enter_context(torch.autocast(device.type, dtype, enabled=dtype is not None))
                tap = stack.enter_context(head_tap(self.model)) if self.split else None
                layers = question.attention
                attention = stack.enter_context(attention_states(self.model, layers)) if layers else []
                outputs = self.model(**inputs, **({"output_hidden_states": True} if question.hidden else {}))
        except torch.OutOfMemoryError as error:
            raise SlimError(memory_advice(self.model)) from error
        answers = None
        if tap is not None:
            states, head = tap.states.flatten(0, -2), self._head()
            answers = LogitAnswers(states, head, self.split.n_classes, dtype)
        elif getattr(outputs, "logits", None) is not None:
            answers = LogitAnswers(outputs.logits.flatten(0, -2), None, outputs.logits.shape[-1])
        return Taught(answers, hidden_states(outputs) if question.hidden else (), attention)

    def _head(self) -> Callable[[Tensor], Tensor]:
        """The output layer as it is while the model teaches: it is run later, when the student has its adapters."""
        head = output_layer(self.model)
        if not (self.is_student and hasattr(head, "enable_adapters")):
            return head

        def run(states: Tensor) -> Tensor:
            with evaluating(head), adapters_disabled(head):
                return head(states)

        return run

    def _move_to(self, device: torch.device) -> None:
        if not self._stays_in_place() and next(self.model.parameters()).device != device:
            self.model.to(device)

    def _stays_in_place(self) -> bool:
        """Whether the weights are the student's, offloaded by somebody else, or shared out already."""
        is_placed = self.is_student or hasattr(self.model, "hf_device_map")
        return is_placed or self._keeper is not None or is_sharded(self.model)

    @contextmanager
    def _teaching(self) -> Iterator[None]:
        if not self.is_student:
            yield
            return
        self.is_busy = True
        try:
            with evaluating(self.model), adapters_disabled(self.model):
                yield
        finally:
            self.is_busy = False


def hidden_states(outputs: Any) -> tuple[Tensor, ...]:
    """Hidden states from the embedding to the last layer; of an encoder-decoder those of the decoder."""
    for name in ("decoder_hidden_states", "hidden_states"):
        if getattr(outputs, name, None) is not None:
            return outputs[name]
    raise SlimError(
        f"A model whose output is {type(outputs).__name__} shows no hidden states. Leave out `hidden`, or use a model "
        "that takes `output_hidden_states=True`."
    )


def freeze_(teacher: nn.Module) -> nn.Module:
    """`teacher` in evaluation mode and without gradients."""
    return teacher.eval().requires_grad_(False)


def self_teacher(student: nn.Module) -> nn.Module:
    """A frozen copy of the student as it is now, without its preparation for quantization."""
    with gathered(student.parameters()):
        twin = plain_copy(student)
    inner = unwrapped(twin)
    if isinstance(
        vars(inner).get("forward"), MethodType
    ):  # TRL's, which calls the forward of the model it was made for
        del inner.forward
    return freeze_(twin)


def check_teacher(student: nn.Module, teacher: nn.Module, shares_classes: bool = True) -> None:
    """Raises SlimError if the teacher's answers do not fit the student's: another vocabulary or label set.

    Args:
        shares_classes: Whether the losses compare class by class.
    """
    for name, what in (("vocab_size", "vocabulary"), ("num_labels", "label set")):
        sizes = [getattr(getattr(model, "config", None), name, None) for model in (student, teacher)]
        if shares_classes and sizes[0] != sizes[1] and None not in sizes:
            raise SlimError(
                f"The teacher has another {what} than the student: {name} {sizes[1]} against {sizes[0]}. Choose a "
                "teacher of the same family, with the same tokenizer and labels; for another vocabulary use "
                "`losses: universal`."
            )
    ours, theirs = (_class_names(model) for model in (student, teacher))
    if shares_classes and ours != theirs and sorted(ours) == sorted(theirs):
        raise SlimError(
            f"The teacher numbers its classes otherwise: {theirs[:5]} against the student's {ours[:5]}. Give both the "
            "same `id2label`."
        )
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise SlimError(
            "The teacher shares weights with the student, so it would change as the student learns. Pass "
            "`copy.deepcopy(model)`, or `teacher='self'`, which copies it or takes the adapters off."
        )


def _class_names(model: nn.Module) -> list[str]:
    return [str(name) for name in (getattr(getattr(model, "config", None), "id2label", None) or {}).values()]


def memory_advice(model: nn.Module) -> str:
    """What to do about a teacher that does not fit, with the sizes that it would have."""
    count = sum(parameter.numel() for parameter in model.parameters())
    sizes = ", ".join(
        f"{option} {count * size / 1e9:.2f} GB"
        for option, size in (
            ("`dtype: bfloat16`", 2), ("`quantization: int8`", 1.1), ("`quantization: nf4`", 0.6),
        )
    )  # fmt: skip
    return (
        f"There is no memory for the teacher of {count / 1e6:,.0f} M parameters. Its weights alone would take, with "
        f"`teacher_load`: {sizes}; `device_map: auto` offloads what does not fit, and `hf-slim cache-teacher` stores "
        "its answers, so that it need not be in memory at all. Smaller micro-batches help too."
    )


def _check_frozen(teacher: nn.Module) -> None:
    learning = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
    if teacher.training or learning:
        what = f"requires gradients ('{learning[0]}')" if learning else "is in training mode, with dropout"
        raise SlimError(
            f"The teacher {what}, so what it teaches would not be what it knows. Pass it as "
            "`teacher.eval().requires_grad_(False)`."
        )


def _check_length(teacher: nn.Module, inputs: Mapping[str, Any]) -> None:
    config = getattr(unwrapped(teacher), "config", None)
    allowed = getattr(config, "max_position_embeddings", None)
    ids = inputs.get("input_ids")
    if type(allowed) is int and isinstance(ids, Tensor) and ids.shape[-1] > allowed > 0:
        raise SlimError(
            f"The teacher takes at most {allowed} tokens, and {ids.shape[-1]} arrived. Use shorter blocks, or a "
            "teacher that reads as far as the student."
        )
