"""Distillation as one line in a Trainer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_slim.core.adapters import adapters_disabled
from hf_slim.core.errors import SlimError
from hf_slim.core.lifecycle import is_prepared
from hf_slim.distillation.attaching import loss_with_term, optimises_own_loss_of_model
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.distiller import Distiller, Pass
from hf_slim.distillation.followed_layers import follow_, forget_projections_
from hf_slim.distillation.objective import Objective
from hf_slim.distillation.on_policy import answer_seed, is_on_policy
from hf_slim.distillation.targets import Targets
from hf_slim.distillation.teachers.live import LiveTeacher, self_teacher
from hf_slim.distillation.teachers.loading import retokenizer_for, teachers_for
from hf_slim.distillation.teachers.stored import DiskTeacher

WHOLE = {"task": "loss_task", "distillation": "loss_distill"}  # in the logs
NOT_REACHED = (
    "The teacher's term never reached the optimizer in the first step: the trainer computes a loss of its own "
    "(`compute_loss_func`, label smoothing, or a subclass). Pass the callback in `Trainer(callbacks=[...])`, and call "
    "`callback.attach(trainer)` before `train`."
)


class DistillationCallback(TrainerCallback):
    """Adds the teacher's term to the loss while the model trains; evaluation never runs the teacher.

    The term is added in a forward hook, where the labels and the Trainer's own count are at hand, so that gradient
    accumulation and data parallelism stay exact. Of a language model no logits are made but a few rows at a time,
    neither the student's nor the teacher's; the task loss is computed along with the term. `loss_task`,
    `loss_distill` and every single term appear in the logs.

    Args:
        config: A `DistillationConfig`, or its fields as a dictionary.
        teacher: A model, or several, to use instead of those that `config.teacher` names: frozen, in evaluation mode.
        teacher_tokenizer: Of a teacher with another vocabulary; it hears the text in its own tokens, and is compared
            where both have read equally far (`losses: universal`). The student's is the Trainer's `processing_class`.
    """

    def __init__(
        self, config: DistillationConfig | dict | None = None, teacher: nn.Module | Sequence[nn.Module] | None = None,
        teacher_tokenizer: Any = None,
    ):  # fmt: skip
        self.config = DistillationConfig.of(config or {})
        self.given = [teacher] if isinstance(teacher, nn.Module) else list(teacher or [])
        self.teacher_tokenizer = teacher_tokenizer
        self.distiller: Distiller | None = None
        self._hooks: list[RemovableHandle] = []
        self._state: TrainerState | None = None  # of the Trainer that this callback belongs to
        self._pass: Pass | None = None
        self._attached = False
        self._kept_targets: Targets | None = None  # labels that an attached trainer keeps from the model
        self._objective: Objective | None = None
        self._reached_backward = False
        self._counted = False  # whether terms are normalised over the whole accumulated batch
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._seed = self._rank = self._micro_step = 0

    @property
    def teacher(self) -> nn.Module | None:
        """The first teacher's model; None if its answers are stored."""
        return self.distiller.teachers[0].model

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        processing_class: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        for other in [getattr(hook, "__self__", None) for hook in model._forward_hooks.values()]:
            if isinstance(other, DistillationCallback):
                if other._state is state:
                    raise SlimError("Two DistillationCallbacks in one Trainer. Use one, with a list of teachers.")
                other._unhook()  # of an earlier Trainer around this model
        teachers = teachers_for(model, self.given, self.config, processing_class)
        followed = follow_(model, teachers, self.config.hidden) if self.config.hidden else None
        precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        retokenizer = retokenizer_for(self.config, processing_class, self.teacher_tokenizer)
        self.distiller = Distiller(model, teachers, self.config, followed, precision, retokenizer)
        self._state, self._seed, self._rank, self._attached = state, args.seed, args.process_index, False
        self._hook()  # before the Trainer wraps the model: on a wrapper, parameters would be gathered or sharded

    def attach(self, trainer: Trainer) -> "DistillationCallback":
        """For trainers that do not optimise the model's own loss: adds the term to what `compute_loss` returns.

        Needed with label smoothing, a `compute_loss_func`, TRL's SFTTrainer, or a subclass with a loss of its own;
        such a loss then is the task loss. Also lets W&B and TensorBoard, which run before the callbacks of a user,
        see the values that this callback logs.

        Args:
            trainer: Built with this callback, or without it.
        Returns: the callback.
        """
        if self.config.on_policy:
            raise SlimError("`on_policy` changes the batch, which a trainer with a loss of its own would not see.")
        handler = trainer.callback_handler
        if self not in handler.callbacks:
            if trainer.optimizer is not None and self.config.hidden:
                raise SlimError("Attach before the optimizer is made: it would not train the projections.")
            tokenizer = trainer.processing_class
            self.on_init_end(trainer.args, trainer.state, trainer.control, trainer.model, processing_class=tokenizer)
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        if not self._attached and not optimises_own_loss_of_model(trainer):
            self._attached = True
            trainer.compute_loss = loss_with_term(trainer, self)
        return self

    def keep_targets(self, labels: Tensor | None, items_in_batch: Tensor | int | None) -> None:
        """Notes what an attached trainer is about to train on, because the model may not be told."""
        self._objective = None
        if labels is not None:
            self._kept_targets = Targets(labels, self.distiller.is_shifted, items_in_batch)

    def take_objective(self) -> Objective | None:
        """The loss of the forward pass since `keep_targets`; None if the model did not train in it."""
        objective, self._objective, self._kept_targets = self._objective, None, None
        return objective

    def add_to_log(self, name: str, value: Tensor) -> None:
        """Adds a micro-batch's share of a loss to what the next log shows."""
        self._sums[name] = self._sums.get(name, 0) + value.detach().clone()  # the Trainer scales losses in place

    @property
    def alpha(self) -> float:
        """The teacher's weight now."""
        return self.config.alpha_at(self._state.global_step / max(self._state.max_steps, 1))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        train_dataloader: DataLoader | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if self.distiller is None:
            raise SlimError(NOT_REACHED)
        self._state = state  # `train` begins with a new one
        if args.label_smoothing_factor and not self._attached:
            raise SlimError(
                f"`label_smoothing_factor` is {args.label_smoothing_factor}: the Trainer then replaces the model's "
                "loss, and the teacher's term would be lost. Call `callback.attach(trainer)` before `train`, or set "
                "it to 0: a teacher smooths the labels already."
            )
        for teacher in self.distiller.teachers:
            if isinstance(teacher, DiskTeacher) and train_dataloader is not None:
                teacher.check_data(train_dataloader.dataset)
        if is_prepared(self.distiller.model):
            self._copy_own_teachers()
        plugin = args.deepspeed_plugin
        self.distiller.share_out_(model, plugin.deepspeed_config if plugin else None)
        if not self._hooks:  # `train` is called once more
            self._hook()

    def _copy_own_teachers(self) -> None:
        """A model that is pruned or rounded while it trains cannot teach itself by taking its adapters off."""
        teachers = self.distiller.teachers
        for index, teacher in enumerate(teachers):
            if teacher.is_student:
                with adapters_disabled(self.distiller.model):
                    copy = self_teacher(self.distiller.model)
                copy.base_model.disable_adapter_layers()
                teachers[index] = LiveTeacher(copy)

    def _hook(self) -> None:
        model = self.distiller.model
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._finish, with_kwargs=True, always_call=True),
        ]

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not (model.training and torch.is_grad_enabled()) or self.distiller.is_busy:
            return None
        targets, alpha, micro_step = self._kept_targets, self.alpha, self._micro_step
        self._micro_step += 1
        if self.config.on_policy and is_on_policy(
            self.config.on_policy.share, self._seed, self._state.global_step, micro_step
        ):
            kwargs, targets = self.distiller.own_words(
                kwargs, answer_seed(self._seed, self._state.global_step, micro_step, self._rank)
            )
            alpha = 1.0  # its own words are no labels
        inputs, self._pass = self.distiller.begin(kwargs, targets, alpha, self._attached)
        return args, inputs

    def _finish(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
        if self._pass is None or self.distiller.is_busy:
            return None
        made, self._pass = self._pass, None
        if outputs is None:  # the forward pass has failed, and its error is on the way
            made.abandon()
            return None
        outputs, objective = self.distiller.finish(made, outputs)
        self._counted = made.targets.items_in_batch is not None
        if not self._reached_backward and objective.total.requires_grad:
            objective.total.register_hook(self._note_backward)
        for name, value in objective.parts.items():
            self.add_to_log(name, value)
        if self._attached:
            self._objective = objective
            return outputs
        if "loss" in getattr(outputs, "__dataclass_fields__", ()):
            outputs["loss"] = objective.total
            return outputs
        return {"loss": objective.total, **outputs}  # of a model without a head

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._micro_step = 0  # a resumed run draws what an uninterrupted one draws

    def _note_backward(self, gradient: Tensor) -> None:
        self._reached_backward = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._steps += 1
        if not self._reached_backward:
            raise SlimError(NOT_REACHED)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs: Any
    ) -> None:
        if "loss" not in logs or not self._steps:
            return
        # a rank holds its share of a sum over all ranks, or else means of micro-batches
        scale = args.world_size if self._counted else 1 / args.gradient_accumulation_steps
        terms = [name for name in self._sums if name not in WHOLE]
        means = {
            WHOLE.get(name, f"loss_{name}"): round(value.item() * scale / self._steps, 4)
            for name, value in self._sums.items()
            if name in WHOLE or len(terms) > 1  # a single term is the distillation loss
        }
        logs.update(means)
        state.log_history[-1].update(means)  # written before this event
        self._sums, self._steps = {}, 0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._unhook()
        if self.distiller is not None:
            forget_projections_(self.distiller.model)
