"""Quantization-aware training as one line in a Trainer."""

import logging
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_slim.core.adapters import adapter_layers
from hf_slim.core.errors import SlimError
from hf_slim.core.lifecycle import begin_run, finish_run, prepare
from hf_slim.core.record import is_prepared, unwrapped
from hf_slim.core.running.calibration import calibrating, first_batches, precision_of_run
from hf_slim.core.running.cards import keep_card_
from hf_slim.core.running.logs import add_to_logs
from hf_slim.core.running.optimizers import require_trained
from hf_slim.quantization.calibration import round_by_gptq_
from hf_slim.quantization.config import QuantizationConfig
from hf_slim.quantization.layers.scale_holders import quantizers
from hf_slim.quantization.transform import average_bits, observe_weights_, share_on_grid

logger = logging.getLogger(__name__)


class QuantizationCallback(TrainerCallback):
    """Rounds weights and activations in the forward pass while training, and packs the model when training ends.

    Logs `bits` (average bits per weight of the quantized layers, scales included) and `share_on_grid` (share of these
    layers whose forward pass rounds now).

    Args:
        config: A `QuantizationConfig`, or its fields as a dictionary.
    """

    def __init__(self, config: QuantizationConfig | dict | None = None):
        self.config = QuantizationConfig.of(config or {})
        self._bits: float | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Prepares the model: layers round in the forward pass from now on."""
        prepare(model, self.config)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        train_dataloader: DataLoader | None = None, optimizer: Optimizer | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Rounds the initial weights by GPTQ, if `initialize` is "gptq" and the run is not resumed.

        Raises: SlimError: if the model is not prepared, or the optimizer does not train what was added to it.
        """
        if not is_prepared(model, "quantization"):
            raise SlimError(
                "The model is not prepared for quantization: either it was converted at the end of an earlier run, or "
                "the callback was added after the Trainer was built. Load the model again and pass the callback in "
                "`Trainer(callbacks=[...])`."
            )
        inner = unwrapped(model)
        added = {name: one for name, one in inner.named_parameters() if name.rpartition(".")[0].endswith("quantizer")}
        require_trained(optimizer, inner, added)
        begin_run(model, "quantization", state)
        self._bits = average_bits(unwrapped(model))
        if self.config.initialize == "gptq" and state.global_step == 0:  # a checkpoint holds rounded weights already
            batches = first_batches(train_dataloader, self.config.calibration_batches)
            with calibrating(model, batches, precision_of_run(args.bf16, args.fp16)) as run_batches:
                round_by_gptq_(unwrapped(model), run_batches, self.config.observer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Enables rounding once `start` is reached."""
        if self.config.start:
            enabled = _progress(state) >= self.config.start
            for quantizer in quantizers(model):
                quantizer.enabled = enabled

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Drops the gradients of scales once they are frozen."""
        if self._is_frozen(state):
            for quantizer in quantizers(model):
                for name, parameter in quantizer.named_parameters(recurse=False):
                    if name != "codebook":
                        parameter.grad = None  # optimizers skip such a parameter, and do not apply its momentum

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Computes stored min-max scales from the changed weights, until the scales are frozen."""
        config = self.config
        follows = config.learn is None and config.observer == "minmax" and config.initialize == "nearest"
        if follows and config.freeze < 1 and not self._is_frozen(state):
            observe_weights_(unwrapped(model), "minmax")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, model: nn.Module,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Adds `bits` and `share_on_grid` to the log."""
        if "loss" in logs and self._bits is not None:
            shown = {"bits": round(self._bits, 3), "share_on_grid": round(share_on_grid(unwrapped(model)), 3)}
            add_to_logs(state, logs, shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Packs the model after all techniques of the run have finished; with adapters, logs how to merge them."""
        self._bits = None
        if adapter_layers(unwrapped(model)):
            logger.warning(
                "The adapters are trained for the merged, quantized model. To get it: "
                "`small = hf_slim.convert(trainer.model)`, then `small.save_pretrained(...)`."
            )
            return
        finish_run(model, "quantization")

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Has the model's card and report uploaded instead of the Trainer's draft of a card."""
        keep_card_(self)

    def _is_frozen(self, state: TrainerState) -> bool:
        return self.config.freeze < 1 and _progress(state) >= self.config.freeze


def _progress(state: TrainerState) -> float:
    return state.global_step / max(state.max_steps, 1)
