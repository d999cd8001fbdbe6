"""Distillation as one line in a Trainer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_slim.core.adapters import adapters_disabled
from hf_slim.core.contracts import PreparedHook
from hf_slim.core.errors import SlimError
from hf_slim.core.lifecycle import begin_run, finish_run
from hf_slim.core.logs import add_to_logs
from hf_slim.core.record import forget_state_, is_prepared, state_of
from hf_slim.distillation.attaching import loss_with_term, optimises_own_loss_of_model
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.distiller import Distiller
from hf_slim.distillation.followed_layers import follow_, forget_projections_
from hf_slim.distillation.on_policy import answer_seed, is_on_policy
from hf_slim.distillation.state import DistillationState
from hf_slim.distillation.teachers.live import LiveTeacher, self_teacher
from hf_slim.distillation.teachers.loading import retokenizer_for, teachers_for
from hf_slim.distillation.teachers.stored import DiskTeacher

WHOLE = {"task": "loss_task", "distillation": "loss_distill"}  # in the logs
NOT_REACHED = (
    "The teacher's term never reached the optimizer in the first step: the trainer computes a loss of its own "
    "(`compute_loss_func`, label smoothing, or a subclass). Pass the callback in `Trainer(callbacks=[...])`, and call "
    "`callback.attach(trainer)` before `train`."
)


class DistillationCallback(TrainerCallback, PreparedHook):
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
        self.run = DistillationState()
        self._seed = self._rank = 0

    @property
    def teacher(self) -> nn.Module | None:
        """The first teacher's model; None before a Trainer is built, or if its outputs are stored."""
        return None if self.distiller is None else self.distiller.teachers[0].model

    @property
    def alpha(self) -> float:
        """The weight of the teacher's term now, in [0, 1]."""
        return self.config.alpha_at(self.run.progress)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        processing_class: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        earlier = state_of(model, DistillationState)
        if earlier.run is state:
            raise SlimError("Two DistillationCallbacks in one Trainer. Use one, with a list of teachers.")
        earlier.unhook()  # of an earlier Trainer around this model
        forget_state_(model, DistillationState)
        teachers = teachers_for(model, self.given, self.config, processing_class)
        followed = follow_(model, teachers, self.config.hidden) if self.config.hidden else None
        precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        retokenizer = retokenizer_for(self.config, processing_class, self.teacher_tokenizer)
        self.distiller = Distiller(model, teachers, self.config, followed, precision, retokenizer)
        self.run = state_of(model, DistillationState)
        self.run.run, self._seed, self._rank = state, args.seed, args.process_index
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
        if not self.run.is_attached and not optimises_own_loss_of_model(trainer):
            self.run.is_attached = True
            trainer.compute_loss = loss_with_term(trainer, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        train_dataloader: DataLoader | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if self.distiller is None:
            raise SlimError(NOT_REACHED)
        self.run.run = state  # `train` begins with a new one
        begin_run(self.distiller.model, "distillation", state)
        if args.label_smoothing_factor and not self.run.is_attached:
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
        if not self.run.hooks:  # `train` is called once more
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
        self.run.hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._finish, with_kwargs=True, always_call=True),
        ]

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not (model.training and torch.is_grad_enabled()) or self.distiller.is_busy:
            return None
        run = self.run
        targets, alpha, step, micro_step = run.targets, self.alpha, run.run.global_step, run.micro_step
        run.micro_step += 1
        if self.config.on_policy and is_on_policy(self.config.on_policy.share, self._seed, step, micro_step):
            kwargs, targets = self.distiller.own_words(kwargs, answer_seed(self._seed, step, micro_step, self._rank))
            alpha = 1.0  # its own words are no labels
        inputs, run.forward = self.distiller.begin(kwargs, targets, alpha, run.is_attached)
        return args, inputs

    def _finish(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
        run = self.run
        if run.forward is None or self.distiller.is_busy:
            return None
        forward, run.forward = run.forward, None
        if outputs is None:  # the forward pass has failed, and its error is on the way
            forward.abandon()
            return None
        outputs, objective = self.distiller.finish(forward, outputs)
        run.counts_items = forward.targets.items_in_batch is not None
        if not run.reached_backward and objective.total.requires_grad:
            objective.total.register_hook(self._note_backward)
        for name, value in objective.parts.items():
            run.add(name, value)
        if run.is_attached:
            run.objective = objective
            return outputs
        if "loss" in getattr(outputs, "__dataclass_fields__", ()):
            outputs["loss"] = objective.total
            return outputs
        return {"loss": objective.total, **outputs}  # of a model without a head

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.run.micro_step = 0  # a resumed run draws what an uninterrupted one draws

    def _note_backward(self, gradient: Tensor) -> None:
        self.run.reached_backward = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.run.steps += 1
        if not self.run.reached_backward:
            raise SlimError(NOT_REACHED)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs: Any
    ) -> None:
        if "loss" not in logs or not self.run.steps:
            return
        # a rank holds its share of a sum over all ranks, or else means of micro-batches
        scale = args.world_size if self.run.counts_items else 1 / args.gradient_accumulation_steps
        means = self.run.take_means(scale)
        has_several_terms = len([name for name in means if name not in WHOLE]) > 1
        shown = {
            WHOLE.get(name, f"loss_{name}"): round(value, 4)
            for name, value in means.items()
            if name in WHOLE or has_several_terms  # a single term is the distillation loss
        }
        add_to_logs(state, logs, shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.run.unhook()
        if self.distiller is not None:
            forget_projections_(self.distiller.model)
            finish_run(self.distiller.model, "distillation")
