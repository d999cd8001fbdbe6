"""The gradient of one step of a distillation run, and ragged data on which a mean per micro-batch is wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_slim import DistillationCallback
from hf_slim.distillation.teachers.live import freeze_
from tests import tiny

ROWS, LENGTH = 8, 12
SETTINGS = {
    "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.0, "save_strategy": "no", "disable_tqdm": True,
    "logging_strategy": "no", "use_cpu": True, "seed": 0, "train_sampling_strategy": "sequential",
}  # fmt: skip


def padded_text(**columns: Any) -> Dataset:
    """8 texts of different lengths with a different number of labels each; of the third and fourth none counts."""
    ids = tiny.tokens(ROWS, LENGTH)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(ROWS):
        mask[row, LENGTH - row % 4 :] = 0
        labels[row, : 1 + row] = -100
    labels[mask == 0] = -100
    labels[2:4] = -100
    rows = {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()}
    return Dataset.from_dict(rows | columns)


def padded_examples(labels: Sequence[Any]) -> Dataset:
    """The same texts with one label, or one list of labels, each."""
    return padded_text().remove_columns("labels").add_column("labels", list(labels))


class Keep(TrainerCallback):
    """Keeps the gradient of one optimizer step."""

    def __init__(self, step: int):
        self.step, self.gradient = step, {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            kept = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
            self.gradient = kept
            control.should_training_stop = True


@dataclass(frozen=True)
class Run:
    """One distillation run.

    Attributes:
        student, teachers: Make the models.
        data: 8 rows.
        config: Of the callback.
        settings: Of the training arguments.
        attach: Whether the callback is attached to the trainer.
        others: Makes callbacks beside it.
        step: Of which the gradient is wanted.
        build: Makes the trainer of model, arguments, data and callbacks.
        arguments: Their class.
    """

    student: Callable[[], nn.Module]
    teachers: Sequence[Callable[[], nn.Module]] = ()
    data: Callable[[], Dataset] = padded_text
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    attach: bool = False
    others: Callable[[], list[TrainerCallback]] = list
    step: int = 0
    build: Callable[..., Trainer] = Trainer
    arguments: type[TrainingArguments] = TrainingArguments

    def but(self, **changes: Any) -> "Run":
        """The run with some attributes changed."""
        return replace(self, **changes)

    def gradient(self, folder: Path, batch: int, accumulation: int = 1) -> dict[str, Tensor]:
        """By parameter name, of micro-batches of `batch` rows."""
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        args = self.arguments(str(folder), **(SETTINGS | sizes | self.settings))
        teachers = [freeze_(make()) for make in self.teachers]
        callback = DistillationCallback(self.config, teacher=teachers or None)
        watch = Keep(self.step)
        callbacks = [*self.others(), *([] if self.attach else [callback]), watch]
        trainer = self.build(model=self.student(), args=args, train_dataset=self.data(), callbacks=callbacks)
        if self.attach:
            callback.attach(trainer)
        trainer.train()
        return watch.gradient


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter's gradient, in the Euclidean norm.

    A gradient that is zero but for rounding, as that of a key's bias, is measured against a thousandth of the whole.
    """
    assert found.keys() == wanted.keys()
    wide = {name: value.double() for name, value in wanted.items()}
    least = 1e-3 * sum(value.norm() ** 2 for value in wide.values()) ** 0.5
    assert least > 0
    return max(float((found[name] - value).norm() / max(value.norm(), least)) for name, value in wide.items())


def accumulation_error(run: Run, folder: Path) -> float:
    """Of 4 micro-batches of 2 against one of 8."""
    return error(run.gradient(folder, 2, 4), run.gradient(folder, 8))
