"""What a micro-batch is to predict, read from what the student is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_slim.core.errors import SlimError
from hf_slim.distillation.losses.fused import Rows

IGNORED = -100  # the label of a position that is not predicted
LABELS = ("labels", "shift_labels")  # the second are in the place of what predicts them, as padding-free batches have


@dataclass(frozen=True)
class Targets:
    """What one micro-batch is to predict, and how much there is to predict in all.

    Attributes:
        labels: `(batch, length)` with -100 where nothing is predicted, or `(batch,)` for one answer per example.
        shifted: Whether position `i` predicts label `i + 1`, as in causal language models.
        items_in_batch: Predictions in all accumulated micro-batches together; None if only this one counts.
        token_weights: `(batch, length)` of the divergences at every position; None: 1.
    """

    labels: Tensor
    shifted: bool
    items_in_batch: Tensor | int | None = None
    token_weights: Tensor | None = None

    @property
    def aligned(self) -> Tensor:
        """What every position predicts."""
        if not self.shifted:
            return self.labels
        return F.pad(self.labels, (0, 1), value=IGNORED)[..., 1:]

    @property
    def divisor(self) -> Tensor | int:
        """What sums over predictions are divided by."""
        return (self.aligned != IGNORED).sum().clamp_min(1) if self.items_in_batch is None else self.items_in_batch

    def rows(self) -> Rows:
        """The rows of `logits.flatten(0, -2)` that predict something."""
        labels = self.aligned.reshape(-1)
        places = (labels != IGNORED).nonzero().squeeze(1)
        weights = None if self.token_weights is None else self.token_weights.reshape(-1)[places]
        return Rows(places, labels[places], weights)

    def shared_out(self, mask: Tensor) -> Tensor:
        """`(batch, length)`: every example counts for as many predictions as it has, shared out among its tokens.

        Terms on hidden states then weigh examples as the task loss does, however a batch is cut into parts.

        Args:
            mask: `(batch, length)`, 0 for padding.
        """
        counts = (self.aligned.reshape(len(mask), -1) != IGNORED).sum(1, keepdim=True)
        return mask.float() * (counts / mask.sum(1, keepdim=True).clamp_min(1)).to(mask.device)


def targets_of(inputs: Mapping[str, Any], shifted: bool, needs_labels: bool, by_example: bool) -> Targets:
    """The labels among the inputs; without any, every token or every example counts once.

    Args:
        inputs: Keyword arguments of the student.
        shifted: Whether position `i` predicts label `i + 1`.
        needs_labels: Whether the task loss counts.
        by_example: Whether examples count where there are no labels, and not tokens.
    Raises: SlimError: if labels are needed and missing.
    """
    items = inputs.get("num_items_in_batch")
    if inputs.get("shift_labels") is not None:
        return Targets(inputs["shift_labels"], False, items)
    if inputs.get("labels") is not None:
        return Targets(inputs["labels"], shifted, items)
    if needs_labels:
        raise SlimError(
            "The model was called without labels, so there is no loss to mix the teacher's term with. Give the "
            "dataset a `labels` column, or set `alpha: 1`. With label smoothing, `compute_loss_func` or TRL's "
            "SFTTrainer, which keep the labels to themselves, call `callback.attach(trainer)` before `train`."
        )
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    if by_example or first.is_floating_point():
        return Targets(torch.zeros(len(first), dtype=torch.long, device=first.device), False)
    mask = inputs.get("attention_mask")
    is_text = torch.ones_like(first) if mask is None else mask
    return Targets(torch.where(is_text == 0, IGNORED, 0), False)


def add_decoder_inputs(model: nn.Module, inputs: dict[str, Any], targets: Targets) -> None:
    """What a decoder reads, made of the labels as the model would make it: the teacher is not shown the labels."""
    given = any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if is_encoder_decoder and not given and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=targets.labels)


def mask_of_text(inputs: Mapping[str, Any]) -> Tensor | None:
    """`(batch, length)` of the tokens that are text; None: all."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if mask is not None and mask.dim() == 2:
        return mask
    return None if ids is None else torch.ones_like(ids)
