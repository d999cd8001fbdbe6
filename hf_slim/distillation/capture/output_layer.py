"""The output layer of a language model, separated from the rest, so that the full logits need not exist."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from hf_slim.core.host import config_value, field_of, main_input_name, method_or_none
from hf_slim.core.modules import device_of, evaluating, temporary_hooks
from hf_slim.core.record import unwrapped

LARGE = 1024.0  # factor of the probe's states, because a cap on logits does not change small ones
PROBE_LENGTH = 8


@dataclass(frozen=True)
class Split:
    """Properties of a model whose logits are exactly the output of its output layer.

    Attributes:
        n_classes: Size of the vocabulary.
        shifted: Whether position `i` predicts label `i + 1`, as in causal models, or label `i`.
    """

    n_classes: int
    shifted: bool


def output_layer(model: nn.Module) -> nn.Module | None:
    """Output layer of a language model, which computes the logits; None if the model has none."""
    find = method_or_none(unwrapped(model), "get_output_embeddings")
    return None if find is None else find()


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss shifts the labels; for models whose output layer cannot be separated."""
    inner = unwrapped(model)
    if output_layer(model) is None or config_value(inner, "is_encoder_decoder", False):
        return False
    return getattr(getattr(inner, "loss_function", None), "__name__", "") == "ForCausalLMLoss"  # GPT-2 names no type


@torch.no_grad()
def split_of(model: nn.Module) -> Split | None:
    """`Split` of a model, found by two small forward passes; None if the output layer cannot be separated.

    It cannot if logits are capped or scaled after the layer, or if the loss has further terms (load balancing of
    experts). Mode and random state of the model are as before afterwards.
    """
    head, inner = output_layer(model), unwrapped(model)
    if head is None or main_input_name(inner) != "input_ids":
        return None
    device = device_of(inner)
    try:
        with evaluating(inner), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            ids = torch.randint(0, inner.config.get_text_config().vocab_size, (1, PROBE_LENGTH), device=device)
            return _split(inner, head, ids)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return None  # the model does not run on tokens alone; an error in it will appear in training


def _split(model: nn.Module, head: nn.Module, ids: Tensor) -> Split | None:
    made: list[Tensor] = []
    handles = (
        head.register_forward_pre_hook(lambda _, args: (args[0] * LARGE, *args[1:])),
        head.register_forward_hook(lambda _, __, out: made.append(out)),
    )
    with temporary_hooks(handles):
        large = model(input_ids=ids, labels=ids).logits
    if len(made) != 1 or made[0].shape != large.shape or not torch.equal(made[0], large):
        return None
    outputs = model(input_ids=ids, labels=ids)
    if field_of(outputs, "aux_loss") is not None:
        return None  # for an untrained model the term may be too small to change the loss visibly
    logits, tolerance = outputs.logits.float(), max(1e-5, 2 * torch.finfo(outputs.loss.dtype).eps)
    for shifted in (True, False):
        predictions, labels = (logits[:, :-1], ids[:, 1:]) if shifted else (logits, ids)
        expected = F.cross_entropy(predictions.flatten(0, 1), labels.flatten())
        if torch.isclose(outputs.loss.float(), expected, rtol=tolerance):
            return Split(logits.shape[-1], shifted)
    return None


class HeadCapture:
    """Records the input of the output layer during one forward pass.

    Args:
        model: Its output layer is looked up at once, because preparing a model replaces layers.
        skips_logits: Whether the layer runs on one position only, for a model whose logits are not used.

    Attributes:
        states: `(batch, length, width)`; None before the forward pass.
    """

    def __init__(self, model: nn.Module, skips_logits: bool):
        self.states: Tensor | None = None
        self._skips_logits = skips_logits
        self._handle: RemovableHandle = output_layer(model).register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.states = args[0]
        return (args[0][..., :1, :], *args[1:]) if self._skips_logits else args

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()


class BackboneCapture:
    """Records the output of the backbone in one forward pass of a model that does not call its output layer.

    TRL's trainers multiply by the weights of the output layer themselves, and the output of the backbone is its input.

    Attributes:
        outputs: What the backbone has returned; None before the forward pass.
    """

    def __init__(self, model: nn.Module):
        self.outputs: Any = None
        self._handle: RemovableHandle = unwrapped(model).base_model.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: tuple[Any, ...], outputs: Any) -> None:
        self.outputs = outputs

    @property
    def states(self) -> Tensor:
        """Last hidden state, `(batch, length, width)`."""
        return self.outputs.last_hidden_state

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()


@contextmanager
def capture_head(model: nn.Module, skips_logits: bool = True) -> Iterator[HeadCapture]:
    """Context manager of a `HeadCapture`, which is closed at the end, also after an exception."""
    capture = HeadCapture(model, skips_logits)
    try:
        yield capture
    finally:
        capture.close()
