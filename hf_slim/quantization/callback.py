"""Quantization-aware training as one line in a Trainer."""

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_slim.core.errors import SlimError
from hf_slim.core.lifecycle import convert, is_prepared, prepare
from hf_slim.quantization.config import QuantizationConfig


class QuantizationCallback(TrainerCallback):
    """Trains on the grid, and packs the model when training ends.

    Args:
        config: A `QuantizationConfig`, or its fields as a dictionary.
    """

    def __init__(self, config: QuantizationConfig | dict | None = None):
        self.config = QuantizationConfig.of(config or {})

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        prepare(model, self.config)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if not is_prepared(model, "quantization"):
            raise SlimError(
                "The model is not prepared for quantization: either it was converted at the end of an earlier run, or "
                "the callback was added after the Trainer was built. Load the model afresh and pass the callback in "
                "`Trainer(callbacks=[...])`."
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if is_prepared(model):  # another technique's callback may have finished the run already
            convert(model)
