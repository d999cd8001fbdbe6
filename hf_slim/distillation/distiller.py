"""One forward pass of a student with its teachers: inputs, recorded activations, and the loss."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.host import config_value, field_of
from hf_slim.core.record import unwrapped
from hf_slim.distillation.capture.attention_states import attention_states
from hf_slim.distillation.capture.output_layer import (
    BackboneCapture,
    capture_head,
    output_layer,
    shifts_labels,
    split_of,
)
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.followed_layers import FollowedLayers
from hf_slim.distillation.forward_pass import ForwardPass
from hf_slim.distillation.losses.attention import attention_sum
from hf_slim.distillation.losses.hidden_states import hidden_sum
from hf_slim.distillation.losses.predictions import MixedPredictions, Predictions
from hf_slim.distillation.losses.regression import OUTPUT_LOSSES, TASK_MEANS
from hf_slim.distillation.objective import Objective, Student, objective_of
from hf_slim.distillation.on_policy import generated_completions
from hf_slim.distillation.targets import IGNORED, LABELS, Targets, add_decoder_inputs, mask_of_text, targets_of
from hf_slim.distillation.teachers.live import LiveTeacher, TeacherOutput, TeacherRequest, hidden_states
from hf_slim.distillation.teachers.retokenizer import NOT_ALIGNED, AlignedPredictions, Retokenizer
from hf_slim.distillation.teachers.sharding import is_partitioned, is_sharded
from hf_slim.distillation.teachers.stored import DiskTeacher

Teacher = LiveTeacher | DiskTeacher
BYPASSES_HEAD = "fused_lm_head"  # the argument by which TRL's trainers tell a model not to compute logits
TOKEN_WEIGHTS = "token_weights"  # a column of the data: (batch, length) weights of the divergences


class Distiller:
    """Teachers and student of one run.

    Args:
        model: The student, as the Trainer has it: adapters around it, but no parallel wrapper.
        teachers: At least one.
        followed: The layers whose hidden states are compared; None: none.
        autocast_dtype: Precision of the run; None: that of the weights.
        retokenizer: For teachers with another vocabulary; None: they read the student's tokens.
    """

    def __init__(
        self, model: nn.Module, teachers: Sequence[Teacher], config: DistillationConfig,
        followed: FollowedLayers | None, autocast_dtype: torch.dtype | None, retokenizer: Retokenizer | None = None,
    ):  # fmt: skip
        self.model, self.teachers, self.config, self.followed = model, list(teachers), config, followed
        self.autocast_dtype, self.retokenizer = autocast_dtype, retokenizer
        self.split = split_of(model)
        self.problem = _problem_type(unwrapped(model))
        self._check_problem()

    @property
    def is_busy(self) -> bool:
        """Whether the model is running as its own teacher."""
        return any(teacher.is_busy for teacher in self.teachers)

    @property
    def _live(self) -> list[LiveTeacher]:
        """The teachers that are in memory."""
        return [teacher for teacher in self.teachers if isinstance(teacher, LiveTeacher)]

    @property
    def is_shifted(self) -> bool:
        """Whether position `i` predicts label `i + 1`."""
        return self.split.shifted if self.split else shifts_labels(self.model)

    def shard_teachers_(self, model: nn.Module, deepspeed: dict[str, Any] | None) -> None:
        """Shard the teachers over the processes, if the Trainer has sharded the student.

        Args:
            model: The student, as the Trainer has wrapped it.
            deepspeed: The run's configuration of DeepSpeed.
        Raises: SlimError: if the student cannot generate text while it is sharded.
        """
        if self.config.on_policy and is_sharded(model):
            raise SlimError(
                "`on_policy` generates text at the beginning of a forward pass, which FSDP does not allow. Train with "
                "DDP or DeepSpeed, or remove `on_policy`."
            )
        for teacher in self._live:
            teacher.shard_(model, deepspeed)
        if is_partitioned(self.model):
            self.split = None  # the output layer has its weights only during the model's own forward pass

    def begin(
        self, inputs: dict[str, Any], targets: Targets | None, alpha: float, trainer_computes_task: bool
    ) -> tuple[dict[str, Any], ForwardPass]:
        """Run the teachers and prepare the student's forward pass.

        Args:
            inputs: Keyword arguments of the student.
            targets: Labels, if the trainer does not pass them to the model; None: those among the inputs.
            alpha: Weight of the teacher's terms, in [0, 1].
            trainer_computes_task: Whether the trainer computes the task loss, and needs the model's outputs for it.
        Returns: the keyword arguments for the model, and what `finish` needs.
        Raises: SlimError: if there are no labels and the task loss has a weight.
        """
        inputs = dict(inputs)
        weights = inputs.pop(TOKEN_WEIGHTS, None)
        if targets is None:
            targets = targets_of(inputs, self.is_shifted, alpha < 1, not self.config.divergences)
        targets = replace(targets, token_weights=weights)
        add_decoder_inputs(unwrapped(self.model), inputs, targets)
        is_labelled = any(inputs.get(name) is not None for name in LABELS)
        skips_logits = self.split is not None and not trainer_computes_task and is_labelled
        current = ForwardPass(targets, skips_logits and alpha < 1, trainer_computes_task, skips_logits, alpha)
        current.read_mask = mask_of_text(inputs)
        has_decoder = inputs.get("decoder_input_ids") is not None
        current.hidden_mask = targets.labels != IGNORED if has_decoder else current.read_mask
        return self._prepared(inputs, current), current

    def _prepared(self, inputs: dict[str, Any], current: ForwardPass) -> dict[str, Any]:
        """Run the teachers, start recording, and return the keyword arguments for the student."""
        pairs = self.config.attention.layer_pairs if self.config.attention else {}
        request = TeacherRequest(self.autocast_dtype, self.followed is not None, list(pairs.values()))
        current.teacher_outputs = self._teacher_outputs(current, inputs, request)
        if current.skips_logits:
            inputs = {name: value for name, value in inputs.items() if name not in (*LABELS, "num_items_in_batch")}
        try:
            self._start_recording(current, inputs, list(pairs))
        except BaseException:
            current.abandon()
            raise
        if self.followed is not None:
            current.returns_hidden = bool(inputs.get("output_hidden_states"))
            inputs["output_hidden_states"] = True
        return inputs

    def _start_recording(self, current: ForwardPass, inputs: dict[str, Any], layers: list[int]) -> None:
        """Record inputs of the output layer and attention states of `layers` until `current.contexts` close."""
        if inputs.get(BYPASSES_HEAD):
            self._check_bypass(current.trainer_computes_task)
            current.capture = BackboneCapture(self.model)
            current.contexts.callback(current.capture.close)
        elif self.split is not None and self.config.divergences:
            current.capture = current.contexts.enter_context(capture_head(self.model, current.skips_logits))
        if layers:
            current.attention = current.contexts.enter_context(attention_states(self.model, layers))

    def _teacher_outputs(
        self, current: ForwardPass, inputs: dict[str, Any], request: TeacherRequest
    ) -> list[TeacherOutput]:
        if self.retokenizer is None:
            return [teacher.forward(inputs, request) for teacher in self.teachers]
        retokenized, positions = self.retokenizer.retokenize(inputs)
        aligned = (positions != NOT_ALIGNED).view(inputs["input_ids"].shape)
        weights = current.targets.token_weights
        weights = aligned.float() if weights is None else weights * aligned
        current.targets = replace(current.targets, token_weights=weights)
        outputs = [teacher.forward(retokenized, request) for teacher in self.teachers]
        return [replace(one, predictions=AlignedPredictions(one.predictions, positions)) for one in outputs]

    def generated_batch(self, inputs: dict[str, Any], seed: int) -> tuple[dict[str, Any], Targets]:
        """Batch in which the student's completions replace those of the data, and its labels.

        The labels of the data set the micro-batch's share in the accumulated batch, whatever the student generates.

        Args:
            inputs: Keyword arguments of the student.
            seed: Of the sampling; see `generation_seed`.
        Raises: SlimError: see `generated_completions`.
        """
        items = inputs.get("num_items_in_batch")
        texts = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim() == 2}
        device, enabled = inputs["input_ids"].device.type, self.autocast_dtype is not None
        with torch.autocast(device, self.autocast_dtype, enabled=enabled):
            generated = generated_completions(self.model, texts, self.config.on_policy, seed)
        targets = Targets(generated["labels"], self.is_shifted)
        if items is not None:
            items = items * (targets.divisor / Targets(inputs["labels"], self.is_shifted).divisor)
        return generated, replace(targets, items_in_batch=items)

    def finish(self, current: ForwardPass, outputs: Any) -> tuple[Any, Objective]:
        """Compute the loss, and return the outputs for the trainer with it.

        Args:
            current: From `begin`.
            outputs: What the model has returned.
        Raises: SlimError: if the outputs of student and teachers do not fit each other.
        """
        current.contexts.close()
        device = (current.capture.states if current.capture else next(iter(outputs.values()))).device
        with torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            student = self._student(current, outputs)
            teacher = self._predictions(current) if self.config.divergences and not self.problem else None
            objective = objective_of(
                student, teacher, current.targets, self.config, current.alpha, current.computes_task
            )
        for teacher in self._live:
            teacher.release()
        returned = {name: value for name, value in outputs.items() if not (current.skips_logits and name == "logits")}
        if not current.returns_hidden:
            returned = {name: value for name, value in returned.items() if not name.endswith("hidden_states")}
        return type(outputs)(**returned) if len(returned) < len(outputs) else outputs, objective

    def _student(self, current: ForwardPass, outputs: Any) -> Student:
        sums = {}
        if self.problem:
            pairs = zip(self._shares(), current.teacher_outputs, strict=True)
            theirs = sum(share * teacher.predictions.states for share, teacher in pairs)
            sums[self.problem] = (1.0, OUTPUT_LOSSES[self.problem](outputs.logits, theirs))
        if self.followed is not None:
            sums["hidden"] = (self.config.hidden.weight, self._hidden(current, outputs))
        if self.config.attention is not None:
            sums["attention"] = (self.config.attention.weight, self._attention(current))
        has_own_task = not (current.skips_logits or current.trainer_computes_task or current.alpha == 1)
        task = _loss_of(outputs) if has_own_task else None
        if current.capture is not None:
            head = output_layer(self.model)
            return Student(current.capture.states, head, self.split.n_classes if self.split else 0, task, sums=sums)
        logits = field_of(outputs, "logits")
        n_classes = 0 if logits is None else logits.shape[-1]
        return Student(logits, None, n_classes, task, TASK_MEANS.get(self.problem), sums)

    def _hidden(self, current: ForwardPass, outputs: Any) -> Tensor:
        ours = hidden_states(current.capture.outputs if isinstance(current.capture, BackboneCapture) else outputs)
        mask = ours[0].new_ones(ours[0].shape[:2]) if current.hidden_mask is None else current.hidden_mask
        weights, total = current.targets.weights_over(mask), 0
        for share, teacher, layers in zip(self._shares(), current.teacher_outputs, self.followed.layers, strict=True):
            found = hidden_sum(ours, teacher.hidden, layers, weights, self.config.hidden, self.followed.projections)
            total = total + share * found
        return total

    def _attention(self, current: ForwardPass) -> Tensor:
        query = current.attention[0].query
        mask = query.new_ones(query.shape[0], query.shape[2]) if current.read_mask is None else current.read_mask
        weights, is_causal = current.targets.weights_over(mask), self.is_shifted
        config = self.config.attention
        return sum(
            share * attention_sum(current.attention, teacher.attention, weights, config, is_causal)
            for share, teacher in zip(self._shares(), current.teacher_outputs, strict=True)
        )

    def _shares(self) -> list[float]:
        weights = self.config.teacher_weights or [1.0] * len(self.teachers)
        return [weight / sum(weights) for weight in weights]

    def _predictions(self, current: ForwardPass) -> Predictions:
        predictions = [teacher.predictions for teacher in current.teacher_outputs]
        if None in predictions:
            raise SlimError(
                "A teacher returns no logits. Use a teacher with an output layer, or set `losses: {}` and `hidden`."
            )
        return predictions[0] if len(predictions) == 1 else MixedPredictions(predictions, self._shares())

    def _check_bypass(self, trainer_computes_task: bool) -> None:
        if not trainer_computes_task:
            raise SlimError(
                "TRL's trainer computes its own loss, so the teacher's term would be lost. Call "
                "`callback.attach(trainer)` before `train`."
            )
        if self.split is None and self.config.divergences:
            raise SlimError(
                f"The logits of {type(unwrapped(self.model)).__name__} cannot be computed by its output layer alone, "
                "and TRL's trainer does not return them. Use `transformers.Trainer`, or set `losses: {}` and `hidden`."
            )

    def _check_problem(self) -> None:
        if self.problem and self.config.divergences != {"forward_kl": 1.0}:
            raise SlimError(
                f"`losses` is {self.config.losses!r}, but a model with problem type {self.problem} predicts no "
                "distribution over classes. Remove `losses`: the distance between the outputs is then the loss."
            )


def _loss_of(outputs: Any) -> Tensor:
    loss = field_of(outputs, "loss")
    if loss is None:
        raise SlimError(
            f"The model was given labels and returned no loss ({type(outputs).__name__}), so the teacher's term has "
            "no task loss to be added to. Use a model with a loss, set `alpha: 1`, or call "
            "`callback.attach(trainer)` with a trainer that computes the loss."
        )
    return loss


def _problem_type(model: nn.Module) -> str | None:
    """Kind of the outputs, if they are no distribution over classes; None for classes."""
    problem = config_value(model, "problem_type")
    if problem is None and vars(model).get("loss_type") == "ForSequenceClassification":
        problem = "regression" if config_value(model, "num_labels") == 1 else None
    return problem if problem in OUTPUT_LOSSES else None
