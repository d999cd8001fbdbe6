"""One forward pass of a student: what the model is given, what is captured, and the loss that comes of it."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.lifecycle import unwrapped
from hf_slim.distillation.alignment import IGNORED, AlignedAnswers, Retokenizer
from hf_slim.distillation.answers import Answers, MixedAnswers
from hf_slim.distillation.attention import attention_sum
from hf_slim.distillation.attention_states import AttentionState, attention_states
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.disk_teacher import DiskTeacher
from hf_slim.distillation.head import BackboneTap, HeadTap, head_tap, output_layer, shifts_labels, split_of
from hf_slim.distillation.hidden import hidden_sum
from hf_slim.distillation.objective import Objective, Student, Targets, objective_of
from hf_slim.distillation.on_policy import own_answers
from hf_slim.distillation.outputs import OUTPUT_LOSSES, TASK_MEANS
from hf_slim.distillation.states import Followed
from hf_slim.distillation.teacher import LiveTeacher, Question, Taught, hidden_states

Teacher = LiveTeacher | DiskTeacher
BYPASSES_HEAD = "fused_lm_head"  # TRL's trainers tell the model not to make logits
LABELS = ("labels", "shift_labels")  # the second are in the place of what predicts them, as padding-free batches have
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
        targets = self._targets(inputs, weights, alpha) if targets is None else replace(targets, token_weights=weights)
        _add_decoder_inputs(unwrapped(self.model), inputs, targets)
        is_labelled = any(inputs.get(name) is not None for name in LABELS)
        narrow = self.split is not None and not leaves_task and is_labelled
        read_mask = _read_mask(inputs)
        mask = read_mask if inputs.get("decoder_input_ids") is None else targets.labels != -100
        made = Pass(targets, narrow and alpha < 1, leaves_task, narrow, alpha, mask=mask, read_mask=read_mask)
        pairs = self.config.attention.layer_pairs if self.config.attention else {}
        question = Question(self.autocast_dtype, self.followed is not None, list(pairs.values()))
        made.taught = self._ask(made, inputs, question)
        if narrow:
            inputs = {name: value for name, value in inputs.items() if name not in (*LABELS, "num_items_in_batch")}
        if inputs.get(BYPASSES_HEAD):
            self._check_bypass(leaves_task)
            made.tap = BackboneTap(self.model)
            made.contexts.callback(made.tap.close)
        elif self.split is not None and self.config.divergences:
            made.tap = made.contexts.enter_context(head_tap(self.model, narrow))
        if pairs:
            made.attention = made.contexts.enter_context(attention_states(self.model, list(pairs)))
        if self.followed is not None:
            made.wants_hidden = bool(inputs.get("output_hidden_states"))
            inputs["output_hidden_states"] = True
        return inputs, made

    def _ask(self, made: Pass, inputs: dict[str, Any], question: Question) -> list[Taught]:
        if self.retokenizer is None:
            return [teacher.ask(inputs, question) for teacher in self.teachers]
        translated, places = self.retokenizer.translate(inputs)
        heard = (places != IGNORED).view(inputs["input_ids"].shape)
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

    def _targets(self, inputs: dict[str, Any], token_weights: Tensor | None, alpha: float) -> Targets:
        items = inputs.get("num_items_in_batch")
        if inputs.get("shift_labels") is not None:
            return Targets(inputs["shift_labels"], False, items, token_weights)
        labels = inputs.get("labels")
        if labels is not None:
            return Targets(labels, self.is_shifted, items, token_weights)
        if alpha < 1:
            raise SlimError(
                "The model was called without labels, so there is no loss to mix the teacher's term with. Give the "
                "dataset a `labels` column, or set `alpha: 1`. With label smoothing, `compute_loss_func` or TRL's "
                "SFTTrainer, which keep the labels to themselves, call `callback.attach(trainer)` before `train`."
            )
        first = next(value for value in inputs.values() if isinstance(value, Tensor))
        if not self.config.divergences or first.is_floating_point():  # every example counts once
            return Targets(torch.zeros(len(first), dtype=torch.long, device=first.device), False)
        mask = inputs.get("attention_mask")
        every = torch.zeros_like(first) if mask is None else mask.long() - 1
        return Targets(torch.where(every < 0, -100, 0), False, token_weights=token_weights)

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


def _add_decoder_inputs(model: nn.Module, inputs: dict[str, Any], targets: Targets) -> None:
    """What a decoder reads, made of the labels as the model would make it: the teacher is not shown the labels."""
    given = any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if is_encoder_decoder and not given and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=targets.labels)


def _read_mask(inputs: dict[str, Any]) -> Tensor | None:
    """`(batch, length)` of the tokens that are text; None: all."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if mask is not None and mask.dim() == 2:
        return mask
    return None if ids is None else torch.ones_like(ids)
