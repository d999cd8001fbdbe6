"""Teachers in memory: frozen models in evaluation mode that are no part of the student."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.adapters import adapters_disabled
from hf_slim.core.errors import SlimError
from hf_slim.core.host import config_of, config_value, field_of, method_or_none, text_config_of
from hf_slim.core.modules import evaluating, plain_copy
from hf_slim.core.record import unwrapped
from hf_slim.distillation.capture.attention_states import AttentionState, attention_states
from hf_slim.distillation.capture.output_layer import Split, capture_head, output_layer, split_of
from hf_slim.distillation.losses.predictions import LogitPredictions, Predictions
from hf_slim.distillation.teachers.sharding import gathered, is_partitioned, is_sharded, reshard_, shard_teacher_

NOT_FOR_THE_TEACHER = (
    "labels", "shift_labels", "num_items_in_batch", "return_dict", "use_cache", "logits_to_keep", "fused_lm_head",
    "output_hidden_states", "output_attentions",
)  # fmt: skip


@dataclass(frozen=True)
class TeacherOutput:
    """Outputs of a teacher for one micro-batch.

    Attributes:
        predictions: Logits or probabilities of the classes; None for a model without an output layer.
        hidden: Layer -> `(batch, length, width)`, the embedding first; empty if not requested.
        attention: States of the requested layers.
    """

    predictions: Predictions | None
    hidden: tuple[Tensor, ...] = ()
    attention: list[AttentionState] = field(default_factory=list)


@dataclass(frozen=True)
class TeacherRequest:
    """The outputs that a teacher must return in addition to its predictions.

    Attributes:
        autocast_dtype: Autocast precision of the run; None: the teacher's own dtype.
        hidden: Whether hidden states are returned.
        attention: Layers whose attention states are returned.
    """

    autocast_dtype: torch.dtype | None = None
    hidden: bool = False
    attention: Sequence[int] = ()


class LiveTeacher:
    """A teacher that runs during training.

    Args:
        model: Frozen and in evaluation mode; or the student itself.
        is_student: Whether it is the student, which is its own teacher without its adapters, so no copy is needed.
    Raises: SlimError: if the model is not frozen or not in evaluation mode.
    """

    def __init__(self, model: nn.Module, is_student: bool = False):
        if not is_student:
            _check_frozen(model)
        self.model, self.is_student = model, is_student
        self.split: Split | None = split_of(model)
        self.is_busy = False  # hooks on the student do nothing meanwhile
        self._engine: Any = None  # DeepSpeed's, which must exist as long as the sharded weights are used

    def shard_(self, student: nn.Module, deepspeed: dict[str, Any] | None) -> None:
        """Shard the weights over the processes if those of the student are sharded.

        Quantized and offloaded teachers are not sharded: they are small, or their devices are chosen already.

        Args:
            student: As the Trainer has wrapped it.
            deepspeed: The run's configuration of DeepSpeed.
        """
        if not (self._is_placed() or getattr(self.model, "is_quantized", False)):
            self._engine = shard_teacher_(self.model, student, deepspeed)
        if is_partitioned(self.model):
            self.split = None  # the output layer has its weights only during the model's own forward pass

    def release(self) -> None:
        """Free memory once the predictions for a micro-batch have been used."""
        if not self.is_student:
            reshard_(self.model)

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Any], request: TeacherRequest) -> TeacherOutput:
        """Run the teacher on the student's inputs.

        Args:
            inputs: Keyword arguments of the student; labels and the like are not passed on.
            request: What to return in addition to the predictions.
        Raises: SlimError: if the text is too long for the teacher, or there is not enough memory.
        """
        inputs = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_TEACHER}
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        dtype = request.autocast_dtype
        _check_length(self.model, inputs)
        try:
            self._move_to(device)
            with ExitStack() as stack:
                stack.enter_context(self._as_teacher())
                stack.enter_context(_without_cache(unwrapped(self.model)))
                stack.enter_context(torch.autocast(device.type, dtype, enabled=dtype is not None))
                capture = stack.enter_context(capture_head(self.model)) if self.split else None
                layers = request.attention
                attention = stack.enter_context(attention_states(self.model, layers)) if layers else []
                outputs = self.model(**inputs, **({"output_hidden_states": True} if request.hidden else {}))
        except torch.OutOfMemoryError as error:
            raise SlimError(memory_advice(self.model)) from error
        predictions, logits = None, field_of(outputs, "logits")
        if capture is not None:
            states, head = capture.states.flatten(0, -2), self._head()
            predictions = LogitPredictions(states, head, self.split.n_classes, dtype)
        elif logits is not None:
            predictions = LogitPredictions(logits.flatten(0, -2), None, logits.shape[-1])
        return TeacherOutput(predictions, hidden_states(outputs) if request.hidden else (), attention)

    def _head(self) -> Callable[[Tensor], Tensor]:
        """Output layer of the teacher. It runs later, when the adapters of the student are enabled again."""
        head = output_layer(self.model)
        if not self.is_student or method_or_none(head, "enable_adapters") is None:
            return head

        def run(states: Tensor) -> Tensor:
            with evaluating(head), adapters_disabled(head):
                return head(states)

        return run

    def _move_to(self, device: torch.device) -> None:
        if not self._is_placed() and next(self.model.parameters()).device != device:
            self.model.to(device)

    def _is_placed(self) -> bool:
        """Whether the weights must not be moved: they are the student's, have a device map, or are sharded."""
        has_device_map = hasattr(self.model, "hf_device_map")
        return self.is_student or has_device_map or self._engine is not None or is_sharded(self.model)

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        if not self.is_student:
            yield
            return
        self.is_busy = True
        try:
            with evaluating(self.model), adapters_disabled(self.model):
                yield
        finally:
            self.is_busy = False


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Lets a model keep no keys and values: with them it takes a batch of concatenated texts for one text."""
    configs = [config for config in (config_of(model), text_config_of(model)) if field_of(config, "use_cache")]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True


def hidden_states(outputs: Any) -> tuple[Tensor, ...]:
    """Hidden states of a model's output, from the embedding to the last layer; of an encoder-decoder, the decoder's.

    Args:
        outputs: Returned by a forward pass with `output_hidden_states=True`.
    Raises: SlimError: if the output contains none.
    """
    for name in ("decoder_hidden_states", "hidden_states"):
        if field_of(outputs, name) is not None:
            return outputs[name]
    raise SlimError(
        f"The model returned {type(outputs).__name__} without hidden states. Remove `hidden`, or use a model that "
        "takes `output_hidden_states=True`."
    )


def freeze_(teacher: nn.Module) -> nn.Module:
    """Put `teacher` in evaluation mode, turn its gradients off, and return it."""
    return teacher.eval().requires_grad_(False)


def self_teacher(student: nn.Module) -> nn.Module:
    """Frozen copy of the student with its current weights, without fake quantization."""
    with gathered(student.parameters()):
        twin = plain_copy(student)
    inner = unwrapped(twin)
    if isinstance(vars(inner).get("forward"), MethodType):  # TRL's, which calls the forward of the original model
        del inner.forward
    return freeze_(twin)


def check_teacher(student: nn.Module, teacher: nn.Module, shares_classes: bool = True) -> None:
    """Check that the teacher's predictions fit the student.

    Args:
        student: The model in training.
        teacher: The model that it learns from.
        shares_classes: Whether the losses compare class by class.
    Raises: SlimError: if vocabulary or label set differ, or both models share weights.
    """
    for name, what in (("vocab_size", "vocabulary"), ("num_labels", "label set")):
        sizes = [config_value(model, name) for model in (student, teacher)]
        if shares_classes and sizes[0] != sizes[1] and None not in sizes:
            raise SlimError(
                f"The teacher has another {what} than the student: {name} {sizes[1]} against {sizes[0]}. Choose a "
                "teacher of the same family, with the same tokenizer and labels; for another vocabulary use "
                "`losses: universal`."
            )
    ours, theirs = (_class_names(model) for model in (student, teacher))
    if shares_classes and ours != theirs and sorted(ours) == sorted(theirs):
        raise SlimError(
            f"The teacher has its classes in another order: {theirs[:5]}, and the student {ours[:5]}. Give both the "
            "same `id2label`."
        )
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise SlimError(
            "The teacher shares weights with the student, so training would change it. Pass `copy.deepcopy(model)`, "
            "or `teacher='self'`, which copies the model or disables its adapters."
        )


def _class_names(model: nn.Module) -> list[str]:
    return [str(name) for name in (config_value(model, "id2label") or {}).values()]


def memory_advice(model: nn.Module) -> str:
    """Advice for a teacher that does not fit in memory, with the size of its weights under each option."""
    count = sum(parameter.numel() for parameter in model.parameters())
    sizes = ", ".join(
        f"{option} {count * size / 1e9:.2f} GB"
        for option, size in (
            ("`dtype: bfloat16`", 2), ("`quantization: int8`", 1.1), ("`quantization: nf4`", 0.6),
        )
    )  # fmt: skip
    return (
        f"There is not enough memory for the teacher of {count / 1e6:,.0f} M parameters. With `teacher_load`, its "
        f"weights alone would take: {sizes}; `device_map: auto` offloads what does not fit. `hf-slim cache-teacher` "
        "stores its predictions, and the teacher is then not loaded. Smaller micro-batches also take less memory."
    )


def _check_frozen(teacher: nn.Module) -> None:
    trainable = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
    if teacher.training or trainable:
        what = f"requires gradients ('{trainable[0]}')" if trainable else "is in training mode, with dropout"
        raise SlimError(
            f"The teacher {what}. It must be frozen and in evaluation mode: pass "
            "`teacher.eval().requires_grad_(False)`."
        )


def _check_length(teacher: nn.Module, inputs: Mapping[str, Any]) -> None:
    allowed = config_value(unwrapped(teacher), "max_position_embeddings")
    ids = inputs.get("input_ids")
    if type(allowed) is int and isinstance(ids, Tensor) and ids.shape[-1] > allowed > 0:
        raise SlimError(
            f"The teacher takes at most {allowed} tokens, got {ids.shape[-1]}. Use shorter blocks, or a "
            "teacher with as many positions as the student."
        )
