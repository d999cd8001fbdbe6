"""Time of a training step: with and without callbacks, or of several models, measured in turn."""

import copy
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_slim.core.config import SlimConfig
from hf_slim.evaluation.latency import spread
from hf_slim.evaluation.tasks.task import Task
from hf_slim.integration.techniques import callbacks_for
from hf_slim.integration.trainer import trainer_for
from hf_slim.timing import interleaved_ms


@dataclass(frozen=True)
class StepTiming:
    """How optimizer steps are timed.

    Attributes:
        training: Fields of `TrainingArguments`.
        batch: One micro-batch, used in every step.
        repeats: Number of timed steps of each side.
    """

    training: dict[str, Any]
    batch: dict[str, Any]
    repeats: int

    def arguments(self, scratch: str) -> TrainingArguments:
        """The Trainer's arguments, with nothing saved or reported."""
        return TrainingArguments(scratch, **(self.training | {"save_strategy": "no", "report_to": "none"}))


def training_speed(
    task: Task, model: PreTrainedModel, configs: list[SlimConfig], timing: StepTiming,
    student: PreTrainedModel | None = None,
) -> dict[str, dict]:  # fmt: skip
    """Milliseconds of one optimizer step on one micro-batch, without and with the callbacks.

    Both sides train the same parameters with the same optimizer, so they need the memory of one run. With a student,
    the base model without callbacks is compared with the student with callbacks.

    Args:
        model: The base model; its weights are changed.
        timing: Batch, repetitions and training arguments.
        student: A smaller model, which the callbacks train instead of `model`.
    Returns: `{"base": spread, "result": spread}`, in milliseconds.
    """
    plain = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    with tempfile.TemporaryDirectory() as scratch:
        args = timing.arguments(scratch)
        base = Stepper.around(trainer_for(plain, args, task.loss_counts_items), timing.batch)
        if student is None:
            callbacks = callbacks_for(configs)
            ours = trainer_for(
                model, args, task.loss_counts_items, callbacks=callbacks, optimizers=(base.optimizer, None)
            )
            ours.callback_handler.optimizer = base.optimizer
        else:
            teacher = copy.deepcopy(model)
            ours = trainer_for(student, args, task.loss_counts_items, callbacks=callbacks_for(configs, teacher))
        result = Stepper.around(ours, timing.batch)
        samples = interleaved_ms({"base": base.step, "result": result.step}, timing.repeats, "training steps")
    return {name: spread(values) for name, values in samples.items()}


def training_speed_of(task: Task, models: dict[str, PreTrainedModel], timing: StepTiming) -> dict[str, dict]:
    """Milliseconds of one plain optimizer step of each model; arguments as in `training_speed`."""
    with tempfile.TemporaryDirectory() as scratch:
        args = timing.arguments(scratch)
        steppers = {
            name: Stepper.around(trainer_for(model, args, task.loss_counts_items), timing.batch)
            for name, model in models.items()
        }
        steps = {name: stepper.step for name, stepper in steppers.items()}
        samples = interleaved_ms(steps, timing.repeats, "training steps")
    return {name: spread(values) for name, values in samples.items()}


@dataclass
class Stepper:
    """One optimizer step of a Trainer, callable separately."""

    trainer: Trainer
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: dict

    @classmethod
    def around(cls, trainer: Trainer, batch: dict) -> "Stepper":
        """A step of `trainer` on `batch`, at a point of gradual pruning where callbacks take most time."""
        optimizer = trainer.optimizer or trainer.create_optimizer()
        state = trainer.state
        state.max_steps, state.global_step = 100, 20  # during gradual pruning, where it takes most time
        state.stateful_callbacks = {}
        trainer.current_gradient_accumulation_steps = 1  # normally set by `train`; losses are divided by it
        trainer.callback_handler.on_train_begin(trainer.args, state, trainer.control)
        return cls(trainer, trainer.accelerator.prepare_model(trainer.model), optimizer, batch)

    def step(self) -> None:
        """Forward, backward, gradient clipping and update, with the events of the callbacks between them."""
        trainer, handler = self.trainer, self.trainer.callback_handler
        handler.on_step_begin(trainer.args, trainer.state, trainer.control)
        items = (self.batch["labels"][..., 1:] != -100).sum() if trainer.model_accepts_loss_kwargs else None
        trainer.training_step(self.model, dict(self.batch), items)
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        handler.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
        self.optimizer.step()
        handler.on_optimizer_step(trainer.args, trainer.state, trainer.control)
        self.model.zero_grad()
        trainer.state.global_step += 1
