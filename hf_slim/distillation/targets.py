"""Labels of a micro-batch and their count, taken from the inputs of the student."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_slim.core.errors import SlimError
from hf_slim.core.host import config_value, method_or_none
from hf_slim.distillation.losses.fused import Rows

IGNORED = -100  # the label of a position without a prediction
LABELS = ("labels", "shift_labels")  # `shift_labels`, in padding-free batches, are shifted already


@dataclass(frozen=True)
class Targets:
    """Labels of one micro-batch, and the number of predictions in the accumulated batch.

    Attributes:
        labels: `(batch, length)` with -100 where nothing is predicted, or `(batch,)` for one label per example.
        shifted: Whether position `i` predicts label `i + 1`, as in causal language models.
        items_in_batch: Predictions in all accumulated micro-batches together; None: only this one is counted.
        token_weights: `(batch, length)`, weights of the divergences at every position; None: 1.
    """

    labels: Tensor
    shifted: bool
    items_in_batch: Tensor | int | None = None
    token_weights: Tensor | None = None

    @property
    def position_labels(self) -> Tensor:
        """The label that every position predicts, in the shape of `labels`."""
        if not self.shifted:
            return self.labels
        return F.pad(self.labels, (0, 1), value=IGNORED)[..., 1:]

    @property
    def divisor(self) -> Tensor | int:
        """The number by which sums over predictions are divided: at least 1, also for a batch without any label."""
        if self.items_in_batch is None:
            return (self.position_labels != IGNORED).sum().clamp_min(1)
        if isinstance(self.items_in_batch, Tensor):
            return self.items_in_batch.clamp_min(1)
        return max(1, self.items_in_batch)

    def rows(self) -> Rows:
        """Rows of `logits.flatten(0, -2)` that have a label."""
        labels = self.position_labels.reshape(-1)
        places = (labels != IGNORED).nonzero().squeeze(1)
        weights = None if self.token_weights is None else self.token_weights.reshape(-1)[places]
        return Rows(places, labels[places], weights)

    def weights_over(self, mask: Tensor) -> Tensor:
        """Weights of tokens, `(batch, length)`: those of an example are equal and sum to its number of predictions.

        Terms on hidden states then give examples the same weight as the task loss does, whatever the micro-batch size.

        Args:
            mask: `(batch, length)`, 0 for padding.
        """
        counts = (self.position_labels.reshape(len(mask), -1) != IGNORED).sum(1, keepdim=True)
        return mask.float() * (counts / mask.sum(1, keepdim=True).clamp_min(1)).to(mask.device)


def targets_of(inputs: Mapping[str, Any], shifted: bool, needs_labels: bool, by_example: bool) -> Targets:
    """Labels among the inputs; without labels, every token or every example is counted as one prediction.

    Args:
        inputs: Keyword arguments of the student.
        shifted: Whether position `i` predicts label `i + 1`.
        needs_labels: Whether the task loss has a weight.
        by_example: Without labels, count examples instead of tokens.
    Raises: SlimError: if labels are needed and missing.
    """
    items = inputs.get("num_items_in_batch")
    if inputs.get("shift_labels") is not None:
        return Targets(inputs["shift_labels"], False, items)
    if inputs.get("labels") is not None:
        return Targets(inputs["labels"], shifted, items)
    if needs_labels:
        raise SlimError(
            "The model was called without `labels`, so the teacher's term has no task loss to be added to. Add a "
            "`labels` column to the dataset, or set `alpha: 1`. Label smoothing, `compute_loss_func` and TRL's "
            "SFTTrainer do not pass labels to the model: there, call `callback.attach(trainer)` before `train`."
        )
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    if by_example or first.is_floating_point():
        return Targets(torch.zeros(len(first), dtype=torch.long, device=first.device), False)
    mask = inputs.get("attention_mask")
    is_text = torch.ones_like(first) if mask is None else mask
    return Targets(torch.where(is_text == 0, IGNORED, 0), False)


def add_decoder_inputs(model: nn.Module, inputs: dict[str, Any], targets: Targets) -> None:
    """Add `decoder_input_ids` of an encoder-decoder, made from the labels, because the teacher receives no labels.

    Args:
        model: The student, without adapters around it.
        inputs: Changed in place, if they have no input for the decoder.
        targets: Give the labels.
    """
    given = any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    prepare = method_or_none(model, "prepare_decoder_input_ids_from_labels")
    if config_value(model, "is_encoder_decoder", False) and not given and prepare is not None:
        inputs["decoder_input_ids"] = prepare(labels=targets.labels)


def mask_of_text(inputs: Mapping[str, Any]) -> Tensor | None:
    """Mask of the tokens that are not padding, `(batch, length)`; None if the inputs contain no tokens."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if mask is not None and mask.dim() == 2:
        return mask
    return None if ids is None else torch.ones_like(ids)
