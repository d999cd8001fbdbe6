"""The Trainer callback of distillation."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_slim.core.adapters import adapters_disabled
from hf_slim.core.contracts import PreparedHook
from hf_slim.core.errors import SlimError
from hf_slim.core.lifecycle import begin_run, finish_run
from hf_slim.core.record import forget_state_, is_prepared, state_of
from hf_slim.core.running.calibration import precision_of_run
from hf_slim.core.running.cards import keep_card_
from hf_slim.core.running.logs import add_to_logs
from hf_slim.core.running.optimizers import require_trained
from hf_slim.distillation.attaching import loss_with_term, optimises_own_loss_of_model
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.distiller import Distiller
from hf_slim.distillation.followed_layers import map_layers_, remove_projections_
from hf_slim.distillation.losses.hidden_states import PROJECTIONS
from hf_slim.distillation.on_policy import generation_seed, is_on_policy
from hf_slim.distillation.state import DistillationState
from hf_slim.distillation.teachers.live import LiveTeacher, self_teacher
from hf_slim.distillation.teachers.loading import retokenizer_for, teachers_for
from hf_slim.distillation.teachers.stored import DiskTeacher

LOG_NAMES = {"task": "loss_task", "distillation": "loss_distill"}  # other terms: "loss_" and their name
NOT_REACHED = (
    "The teacher's term did not reach the optimizer in the first step: the trainer computes its own loss "
    "(`compute_loss_func`, label smoothing, or a subclass). Pass the callback in `Trainer(callbacks=[...])`, and call "
    "`callback.attach(trainer)` before `train`."
)


class DistillationCallback(TrainerCallback, PreparedHook):
    """Adds the teacher's term to the loss of a model in training; evaluation never runs the teacher.

    A forward hook adds the term. It has the labels and the Trainer's count of predictions, so that the gradient is
    exact under gradient accumulation and data parallelism. For a language model, the logits of student and teacher are
    computed a few rows at a time, and the task loss together with the term. The logs contain `loss_task`,
    `loss_distill` and, if there are several terms, each of them.

    Args:
        config: A `DistillationConfig`, or its fields as a dictionary.
        teacher: A model, or several, to use instead of those that `config.teacher` names. They must be frozen and in
            evaluation mode.
        teacher_tokenizer: Tokenizer of a teacher with another vocabulary, for `losses: universal`. The text is
            re-tokenized for the teacher, and the loss is taken where token boundaries coincide. The student's
            tokenizer is the Trainer's `processing_class`.
    """

    def __init__(
        self,
        config: DistillationConfig | dict[str, Any] | None = None,
        teacher: nn.Module | Sequence[nn.Module] | None = None,
        teacher_tokenizer: Any = None,
    ):
        self.config = DistillationConfig.of(config or {})
        self.given = [teacher] if isinstance(teacher, nn.Module) else list(teacher or [])
        self.teacher_tokenizer = teacher_tokenizer
        self.distiller: Distiller | None = None
        self.run = DistillationState()
        self._seed = self._rank = 0

    @property
    def teacher(self) -> nn.Module | None:
        """The first teacher's model; None before a Trainer is built, or if its predictions are stored."""
        return None if self.distiller is None else self.distiller.teachers[0].model

    @property
    def alpha(self) -> float:
        """Current weight of the teacher's term, in [0, 1]."""
        return self.config.alpha_at(self.run.progress)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        processing_class: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Load the teachers and register the hooks, before the Trainer wraps the model.

        Raises: SlimError: if the Trainer has another DistillationCallback, or a teacher does not fit the student.
        """
        earlier = state_of(model, DistillationState)
        if earlier.run is state:
            raise SlimError("Two DistillationCallbacks in one Trainer. Use one, with a list of teachers.")
        earlier.unhook()  # hooks of an earlier Trainer with this model
        forget_state_(model, DistillationState)
        teachers = teachers_for(model, self.given, self.config, processing_class)
        followed = map_layers_(model, teachers, self.config.hidden) if self.config.hidden else None
        precision = precision_of_run(args.bf16, args.fp16)
        retokenizer = retokenizer_for(self.config, processing_class, self.teacher_tokenizer)
        self.distiller = Distiller(model, teachers, self.config, followed, precision, retokenizer)
        self.run = state_of(model, DistillationState)
        self.run.run, self._seed, self._rank = state, args.seed, args.process_index
        self._hook()  # not on a wrapper, whose parameters may be gathered or sharded

    def attach(self, trainer: Trainer) -> "DistillationCallback":
        """Add the teacher's term to the loss that `compute_loss` returns, and return the callback.

        Needed for trainers that do not optimise the model's own loss: label smoothing, a `compute_loss_func`, TRL's
        SFTTrainer, or a subclass that overrides `compute_loss`. That loss is then the task loss. The callback also
        moves before all others, so that W&B and TensorBoard receive the values that it logs.

        Args:
            trainer: Built with this callback, or without it.
        Raises: SlimError: with `on_policy`, or with `hidden` if the optimizer has been made already.
        """
        if self.config.on_policy:
            raise SlimError(
                "`on_policy` replaces the batch inside the model's forward pass, but an attached trainer computes its "
                "loss on the original batch. Remove `on_policy`, or do not call `attach`."
            )
        handler = trainer.callback_handler
        if self not in handler.callbacks:
            if trainer.optimizer is not None and self.config.hidden:
                raise SlimError(
                    "`hidden` adds projections to the model, and the trainer's optimizer, which is made already, "
                    "would not train them. Call `callback.attach(trainer)` before the optimizer is made."
                )
            tokenizer = trainer.processing_class
            self.on_init_end(trainer.args, trainer.state, trainer.control, trainer.model, processing_class=tokenizer)
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        if not self.run.is_attached and not optimises_own_loss_of_model(trainer):
            self.run.is_attached = True
            trainer.compute_loss = loss_with_term(trainer, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        train_dataloader: DataLoader | None = None, optimizer: Optimizer | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Shard the teachers as the Trainer has sharded the student, and check the data of a stored teacher.

        Raises: SlimError: if the Trainer would not use the teacher's term, or a training example is not stored.
        """
        if self.distiller is None:
            raise SlimError(NOT_REACHED)
        inner = self.distiller.model
        projections = {name: one for name, one in inner.named_parameters() if PROJECTIONS in name.split(".")}
        require_trained(optimizer, inner, projections)
        self.run.run = state  # `train` makes a new one
        begin_run(self.distiller.model, "distillation", state)
        if args.label_smoothing_factor and not self.run.is_attached:
            raise SlimError(
                f"`label_smoothing_factor` is {args.label_smoothing_factor}: the Trainer then replaces the model's "
                "loss, and the teacher's term would be lost. Call `callback.attach(trainer)` before `train`, or set "
                "the factor to 0, because the teacher's probabilities are soft labels already."
            )
        for teacher in self.distiller.teachers:
            if isinstance(teacher, DiskTeacher) and train_dataloader is not None:
                teacher.check_data(train_dataloader.dataset)
        if is_prepared(self.distiller.model):
            self._copy_own_teachers()
        plugin = args.deepspeed_plugin
        self.distiller.shard_teachers_(model, plugin.deepspeed_config if plugin else None)
        if not self.run.hooks:  # an earlier `train` has removed them
            self._hook()

    def _copy_own_teachers(self) -> None:
        """Replace a teacher that shares the student's weights by a copy: pruning or rounding would change it."""
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
            kwargs, targets = self.distiller.generated_batch(
                kwargs, generation_seed(self._seed, step, micro_step, self._rank)
            )
            alpha = 1.0  # generated tokens are no labels
        inputs, run.forward_pass = self.distiller.begin(kwargs, targets, alpha, run.is_attached)
        return args, inputs

    def _finish(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
        run = self.run
        if run.forward_pass is None or self.distiller.is_busy:
            return None
        current, run.forward_pass = run.forward_pass, None
        if outputs is None:  # the forward pass has raised an error
            current.abandon()
            return None
        outputs, objective = self.distiller.finish(current, outputs)
        run.counts_items = current.targets.items_in_batch is not None
        if not run.reached_backward and objective.total.requires_grad:
            objective.total.register_hook(self._note_backward)
        for name, value in objective.parts.items():
            run.add(name, value)
        if run.is_attached:
            run.objective = objective
            return outputs
        if is_dataclass(outputs) and "loss" in {field.name for field in fields(outputs)}:
            outputs["loss"] = objective.total
            return outputs
        return {"loss": objective.total, **outputs}  # the output of a model without a head has no such field

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting micro-batches from 0, so that a resumed run draws the same random numbers."""
        self.run.micro_step = 0

    def _note_backward(self, gradient: Tensor) -> None:
        self.run.reached_backward = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise a SlimError if no gradient of the teacher's term has been computed in the first step."""
        self.run.steps += 1
        if not self.run.reached_backward:
            raise SlimError(NOT_REACHED)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Add the means of the losses since the last log."""
        if "loss" not in logs or not self.run.steps:
            return
        # a rank has its share of a sum over all ranks, or means of micro-batches
        scale = args.world_size if self.run.counts_items else 1 / args.gradient_accumulation_steps
        means = self.run.take_means(scale)
        has_several_terms = len([name for name in means if name not in LOG_NAMES]) > 1
        shown = {
            LOG_NAMES.get(name, f"loss_{name}"): round(value, 4)
            for name, value in means.items()
            if name in LOG_NAMES or has_several_terms  # a single term is the distillation loss
        }
        add_to_logs(state, logs, shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Remove hooks and projections from the model."""
        self.run.unhook()
        if self.distiller is not None:
            remove_projections_(self.distiller.model)
            finish_run(self.distiller.model, "distillation")

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Has the model's card and report uploaded instead of the Trainer's draft of a card."""
        keep_card_(self)
