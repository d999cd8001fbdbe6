"""Distillation as one line in a Trainer."""

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_slim.core.errors import SlimError
from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.objective import Targets, mix_losses
from hf_slim.distillation.teacher import ask, check_teacher, freeze_, self_teacher

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification",
                "AutoModelForTokenClassification")  # fmt: skip


class DistillationCallback(TrainerCallback):
    """Adds the teacher's term to the loss while the model trains; evaluation never runs the teacher.

    The term is added in a forward hook, where the labels and the Trainer's own count are at hand, so that gradient
    accumulation and data parallelism stay exact. `loss_task` and `loss_distillation` appear in the logs.

    Args:
        config: A `DistillationConfig`, or its fields as a dictionary.
        teacher: A model to use instead of the one that `config.teacher` names; not trained, not saved.
    """

    def __init__(self, config: DistillationConfig | dict | None = None, teacher: nn.Module | None = None):
        self.config = DistillationConfig.of(config or {})
        self.teacher = teacher
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._state: TrainerState | None = None  # of the Trainer that this callback belongs to
        self._autocast_dtype: torch.dtype | None = None
        self._shifted = False  # whether a position predicts the next label
        self._reached_backward = False
        self._counted = False  # whether terms are normalised over the whole accumulated batch
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        _check_task(args, model)
        for other in [getattr(hook, "__self__", None) for hook in model._forward_hooks.values()]:
            if isinstance(other, DistillationCallback):
                if other._state is state:
                    raise SlimError("Two DistillationCallbacks in one Trainer. Use one teacher per run.")
                other._hook.remove()  # of an earlier Trainer around this model
        if self.teacher is None:
            self.teacher = self_teacher(model) if self.config.teacher == "self" else _load(self.config.teacher, model)
        freeze_(self.teacher)
        check_teacher(model, self.teacher)
        self._shifted = getattr(model, "loss_type", None) == "ForCausalLM"
        self._autocast_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self._state = state
        # before the Trainer wraps the model: a hook on a wrapper would see gathered or sharded parameters
        self._hook = model.register_forward_hook(self._add_term, with_kwargs=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if self._hook is None and self._state is not None:  # `train` is called once more
            self._hook = model.register_forward_hook(self._add_term, with_kwargs=True)

    def _add_term(self, model: nn.Module, args: tuple, kwargs: dict, outputs: dict) -> dict:
        if not (model.training and torch.is_grad_enabled()):
            return outputs
        if kwargs.get("labels") is None or not isinstance(outputs, dict) or outputs.get("loss") is None:
            raise SlimError(
                "The model was called without labels, so it has no loss to add the teacher's term to. Give the "
                "dataset a `labels` column, and set `label_smoothing_factor=0` and no `compute_loss_func`."
            )
        objective = mix_losses(
            task=outputs["loss"],
            student=outputs["logits"],
            teacher=ask(self.teacher, kwargs, self._autocast_dtype),
            targets=Targets(kwargs["labels"], self._shifted, kwargs.get("num_items_in_batch")),
            config=self.config,
        )
        self._counted = kwargs.get("num_items_in_batch") is not None
        if not self._reached_backward:
            objective.distillation.register_hook(self._note_backward)
        for name in ("task", "distillation"):
            value = getattr(objective, name).detach().clone()  # the Trainer scales its loss in place
            self._sums[name] = self._sums.get(name, 0) + value
        outputs["loss"] = objective.total
        return outputs

    def _note_backward(self, gradient: Tensor) -> None:
        self._reached_backward = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._steps += 1
        if not self._reached_backward:
            raise SlimError(
                "The teacher's term never reached the optimizer in the first step: the trainer computes a loss of its "
                "own (`compute_loss_func`, label smoothing, or a subclass). Let it use the model's `outputs.loss`, "
                "and pass the callback in `Trainer(callbacks=[...])`."
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs
    ) -> None:
        if "loss" not in logs or not self._steps:
            return
        # a rank holds its share of a sum over all ranks, or else means of micro-batches
        scale = args.world_size if self._counted else 1 / args.gradient_accumulation_steps
        means = {f"loss_{name}": round(value.item() * scale / self._steps, 4) for name, value in self._sums.items()}
        logs.update(means)
        state.log_history[-1].update(means)  # written before this event
        self._sums, self._steps = {}, 0

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _check_task(args: TrainingArguments, model: nn.Module) -> None:
    if args.label_smoothing_factor:
        raise SlimError(
            f"`label_smoothing_factor` is {args.label_smoothing_factor}: the Trainer then replaces the model's loss "
            "and the teacher's term would be lost. Set it to 0; a teacher smooths the labels already."
        )
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem is None and getattr(model, "loss_type", None) == "ForSequenceClassification" and config.num_labels == 1:
        problem = "regression"
    if problem in ("regression", "multi_label_classification"):
        raise SlimError(
            f"The problem type {problem} has no distribution over classes to distil. "
            "Use single-label classification, masked or causal language modelling."
        )


def _load(name: str, student: nn.Module) -> nn.Module:
    """The teacher `name`, with the head that the student has."""
    for auto_name in AUTO_CLASSES:
        auto = getattr(transformers, auto_name)
        if type(student) in auto._model_mapping.values():
            try:
                return auto.from_pretrained(name)
            except OSError as error:
                raise SlimError(
                    f"The teacher '{name}' could not be loaded: {error} Pass 'self', a Hub id, or a folder that "
                    "`from_pretrained` accepts."
                ) from error
    raise SlimError(
        f"Which head a teacher for {type(student).__name__} needs is not known. Load it yourself and pass "
        "`DistillationCallback(config, teacher=model)`."
    )
