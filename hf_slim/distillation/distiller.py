"""One forward pass of a student: what the model is given, what is captured, and the loss that comes of it."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.record import unwrapped
from hf_slim.distillation.capture.attention_states import AttentionState, attention_states
from hf_slim.distillation.capture.output_layer import (
    BackboneTap,
    HeadTap,
    head_tap,
    output_layer,
    shifts_labels,
    split_of,
)
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.followed_layers import Followed
from hf_slim.distillation.losses.answers import Answers, MixedAnswers
from hf_slim.distillation.losses.attention import attention_sum
from hf_slim.distillation.losses.hidden_states import hidden_sum
from hf_slim.distillation.losses.regression import OUTPUT_LOSSES, TASK_MEANS
from hf_slim.distillation.objective import Objective, Student, objective_of
from hf_slim.distillation.on_policy import own_answers
from hf_slim.distillation.targets import LABELS, Targets, add_decoder_inputs, mask_of_text, targets_of
from hf_slim.distillation.teachers.live import LiveTeacher, Question, Taught, hidden_states
from hf_slim.distillation.teachers.retokenizer import UNHEARD, AlignedAnswers, Retokenizer
from hf_slim.distillation.teachers.sharding import is_partitioned, is_sharded
from hf_slim.distillation.teachers.stored import DiskTeacher

Teacher = LiveTeacher | DiskTeacher
BYPASSES_HEAD = "fused_lm_head"  # TRL's trainers tell the model not to make logits
TOKEN_WEIGHTS = "token_weights"  # a column of the data: (batch, length) weights of the divergences


@dataclass
class Pass:
    """What is known while the student runs.

    Attributes:
        targets: Labels and their count.
        computes_task: Whether the task loss is computed from the labels here.
        leaves_task: Whether the trainer computes the task loss: the model's own, if it computes one, does not count.
        narrow: Whether the model makes no logits.
        alpha: The teacher's weight now.
        taught: What each teacher said.
        contexts: What is open until the student is done.
    """

    targets: Targets
    computes_task: bool
    leaves_task: bool
    narrow: bool
    alpha: float
    taught: list[Taught] = field(default_factory=list)
    contexts: ExitStack = field(default_factory=ExitStack)
    tap: HeadTap | BackboneTap | None = None
    attention: list[AttentionState] = field(default_factory=list)
    mask: Tensor | None = None  # of the tokens whose hidden states are followed; None: all
    read_mask: Tensor | None = None  # of the tokens that are read; of an encoder-decoder, by the encoder
    wants_hidden: bool = False  # whether the caller asked for hidden states

    def abandon(self) -> None:
        """Leaves the model as it was after a forward pass that failed."""
        self.contexts.__exit__(RuntimeError, RuntimeError("the forward pass failed"), None)


class Distiller:
    """Teachers and student of one run.

    Args:
        model: The student, as the Trainer has it: adapters around it, but no parallel wrapper.
        teachers: At least one.
        followed: Hidden states that the student follows; None: none.
        retokenizer: For teachers with another vocabulary; None: they read the student's tokens.
        autocast_dtype: Precision of the run; None: that of the weights.
    """

    def __init__(
        self, model: nn.Module, teachers: Sequence[Teacher], config: DistillationConfig, followed: Followed | None,
        autocast_dtype: torch.dtype | None, retokenizer: Retokenizer | None = None,
    ):  # fmt: skip
        self.model, self.teachers, self.config, self.followed = model, list(teachers), config, followed
        self.autocast_dtype, self.retokenizer = autocast_dtype, retokenizer
        self.split = split_of(model)
        self.problem = _problem_type(unwrapped(model))
        self._check_problem()

    @property
    def is_busy(self) -> bool:
        """Whether the model runs as its own teacher just now."""
        return any(teacher.is_busy for teacher in self.teachers)

    @property
    def _live(self) -> list[LiveTeacher]:
        """The teachers that are in memory."""
        return [teacher for teacher in self.teachers if isinstance(teacher, LiveTeacher)]

    def share_out_(self, model: nn.Module, deepspeed: dict[str, Any] | None) -> None:
        """Spreads the teachers over the processes, if the Trainer has spread the student.

        Args:
            model: The student, wrapped.
            deepspeed: The run's configuration of DeepSpeed.
        Raises: SlimError: if the student cannot write its own texts that way.
        """
        if self.config.on_policy and is_sharded(model):
            raise SlimError(
                "`on_policy` writes texts while a forward pass begins, which FSDP does not allow. Train with DDP or "
                "DeepSpeed, or leave `on_policy` out."
            )
        for teacher in self._live:
            teacher.share_out_(model, deepspeed)
        if is_partitioned(self.model):
            self.split = None  # its output layer has weights only within its forward pass

    def begin(
        self, inputs: dict[str, Any], targets: Targets | None, alpha: float, leaves_task: bool
    ) -> tuple[dict[str, Any], Pass]:
        """Asks the teachers, and prepares the student's forward pass.

        Args:
            inputs: Keyword arguments of the student.
            targets: Labels, where the trainer keeps them to itself; None: those among the inputs.
            leaves_task: Whether the trainer computes the task loss, and needs the model's outputs for it.
        Returns: the keyword arguments that the model shall see, and what `finish` needs.
        Raises: SlimError: if there are no labels and the task loss counts.
        """
        inputs = dict(inputs)
        weights = inputs.pop(TOKEN_WEIGHTS, None)
        if targets is None:
            targets = targets_of(inputs, self.is_shifted, alpha < 1, not self.config.divergences)
        targets = replace(targets, token_weights=weights)
        add_decoder_inputs(unwrapped(self.model), inputs, targets)
        is_labelled = any(inputs.get(name) is not None for name in LABELS)
        narrow = self.split is not None and not leaves_task and is_labelled
        read_mask = mask_of_text(inputs)
        mask = read_mask if inputs.get("decoder_input_ids") is None else targets.labels != -100
        made = Pass(targets, narrow and alpha < 1, leaves_task, narrow, alpha, mask=mask, read_mask=read_mask)
        pairs = self.config.attention.layer_pairs if self.config.attention else {}
        question = Question(self.autocast_dtype, self.followed is not None, list(pairs.values()))
        made.taught = self._ask(made, inputs, question)
        if narrow:
            inputs = {name: value for name, value in inputs.items() if name not in (*LABELS, "num_items_in_batch")}
        try:
            self._open(made, inputs, list(pairs))
        except BaseException:
            made.abandon()
            raise
        if self.followed is not None:
            made.wants_hidden = bool(inputs.get("output_hidden_states"))
            inputs["output_hidden_states"] = True
        return inputs, made

    def _open(self, made: Pass, inputs: dict[str, Any], layers: list[int]) -> None:
        """Opens what records the student's forward pass: its last states, and the attention of `layers`."""
        if inputs.get(BYPASSES_HEAD):
            self._check_bypass(made.leaves_task)
            made.tap = BackboneTap(self.model)
            made.contexts.callback(made.tap.close)
        elif self.split is not None and self.config.divergences:
            made.tap = made.contexts.enter_context(head_tap(self.model, made.narrow))
        if layers:
            made.attention = made.contexts.enter_context(attention_states(self.model, layers))

    def _ask(self, made: Pass, inputs: dict[str, Any], question: Question) -> list[Taught]:
        if self.retokenizer is None:
            return [teacher.ask(inputs, question) for teacher in self.teachers]
        translated, places = self.retokenizer.translate(inputs)
        heard = (places != UNHEARD).view(inputs["input_ids"].shape)
        weights = made.targets.token_weights
        made.targets = replace(made.targets, token_weights=heard.float() if weights is None else weights * heard)
        taught = [teacher.ask(translated, question) for teacher in self.teachers]
        return [replace(one, answers=AlignedAnswers(one.answers, places)) for one in taught]

    def own_words(self, inputs: dict[str, Any], seed: int) -> tuple[dict[str, Any], Targets]:
        """The batch with the student's own answers in the place of the data's.

        The micro-batch keeps the share in the accumulated batch that its labels gave it, whatever the student wrote.
        """
        items = inputs.get("num_items_in_batch")
        texts = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim() == 2}
        device, enabled = inputs["input_ids"].device.type, self.autocast_dtype is not None
        with torch.autocast(device, self.autocast_dtype, enabled=enabled):
            own = own_answers(self.model, texts, self.config.on_policy, seed)
        targets = Targets(own["labels"], self.is_shifted)
        if items is not None:
            items = items * (targets.divisor / Targets(inputs["labels"], self.is_shifted).divisor)
        return own, replace(targets, items_in_batch=items)

    def finish(self, made: Pass, outputs: Any) -> tuple[Any, Objective]:
        """The model's outputs as the trainer shall see them, and the loss."""
        made.contexts.close()
        device = (made.tap.states if made.tap else next(iter(outputs.values()))).device
        with torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            student = self._student(made, outputs)
            answers = self._answers(made) if self.config.divergences and not self.problem else None
            objective = objective_of(student, answers, made.targets, self.config, made.alpha, made.computes_task)
        for teacher in self._live:
            teacher.rest()
        shown = {name: value for name, value in outputs.items() if not (made.narrow and name == "logits")}
        if not made.wants_hidden:
            shown = {name: value for name, value in shown.items() if not name.endswith("hidden_states")}
        return type(outputs)(**shown) if len(shown) < len(outputs) else outputs, objective

    def _student(self, made: Pass, outputs: Any) -> Student:
        sums = {}
        if self.problem:
            theirs = sum(w * t.answers.states for w, t in zip(self._shares(), made.taught, strict=True))
            sums[self.problem] = (1.0, OUTPUT_LOSSES[self.problem](outputs.logits, theirs))
        if self.followed is not None:
            sums["hidden"] = (self.config.hidden.weight, self._hidden(made, outputs))
        if self.config.attention is not None:
            sums["attention"] = (self.config.attention.weight, self._attention(made))
        task = None if made.narrow or made.leaves_task or made.alpha == 1 else _loss_of(outputs)
        if made.tap is not None:
            head = output_layer(self.model)
            return Student(made.tap.states, head, self.split.n_classes if self.split else 0, task, sums=sums)
        logits = getattr(outputs, "logits", None)
        n_classes = 0 if logits is None else logits.shape[-1]
        return Student(logits, None, n_classes, task, TASK_MEANS.get(self.problem), sums)

    def _hidden(self, made: Pass, outputs: Any) -> Tensor:
        ours = hidden_states(made.tap.outputs if isinstance(made.tap, BackboneTap) else outputs)
        weights = made.targets.shared_out(made.mask if made.mask is not None else ours[0].new_ones(ours[0].shape[:2]))
        total = 0
        for share, taught, layers in zip(self._shares(), made.taught, self.followed.layers, strict=True):
            found = hidden_sum(ours, taught.hidden, layers, weights, self.config.hidden, self.followed.projections)
            total = total + share * found
        return total

    def _attention(self, made: Pass) -> Tensor:
        query = made.attention[0].query
        mask = query.new_ones(query.shape[0], query.shape[2]) if made.read_mask is None else made.read_mask
        weights, is_causal = made.targets.shared_out(mask), self.is_shifted
        config = self.config.attention
        return sum(
            share * attention_sum(made.attention, taught.attention, weights, config, is_causal)
            for share, taught in zip(self._shares(), made.taught, strict=True)
        )

    def _shares(self) -> list[float]:
        weights = self.config.teacher_weights or [1.0] * len(self.teachers)
        return [weight / sum(weights) for weight in weights]

    def _answers(self, made: Pass) -> Answers:
        answers = [taught.answers for taught in made.taught]
        if None in answers:
            raise SlimError("A teacher gives no logits. Use a model with a head, or `losses: {}` with `hidden`.")
        return answers[0] if len(answers) == 1 else MixedAnswers(answers, self._shares())

    @property
    def is_shifted(self) -> bool:
        """Whether a position predicts the next label."""
        return self.split.shifted if self.split else shifts_labels(self.model)

    def _check_bypass(self, leaves_task: bool) -> None:
        if not leaves_task:
            raise SlimError(
                "TRL's trainer computes a loss of its own, so the teacher's term would be lost. Call "
                "`callback.attach(trainer)` before `train`."
            )
        if self.split is None and self.config.divergences:
            raise SlimError(
                f"The logits of {type(unwrapped(self.model)).__name__} are not just what its output layer makes, and "
                "TRL's trainer does not show them. Use `transformers.Trainer`, or `losses: {}` with `hidden`."
            )

    def _check_problem(self) -> None:
        if self.problem and self.config.divergences != {"forward_kl": 1.0}:
            raise SlimError(
                f"The problem type {self.problem} has no distribution over classes, so `losses` cannot be "
                f"{self.config.losses!r}. Leave `losses` out: the distance of the outputs is learned."
            )


def _loss_of(outputs: Any) -> Tensor:
    if getattr(outputs, "loss", None) is None:
        raise SlimError(
            f"The model was given labels and returned no loss ({type(outputs).__name__}), so there is nothing to mix "
            "the teacher's term with. Use a model with a loss, set `alpha: 1`, or attach to a trainer that has one."
        )
    return outputs.loss


def _problem_type(model: nn.Module) -> str | None:
    """The kind of outputs that are no distribution over classes; None for classes."""
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem is None and getattr(model, "loss_type", None) == "ForSequenceClassification" and config.num_labels == 1:
        problem = "regression"
    return problem if problem in OUTPUT_LOSSES else None
