"""The output layer of a language model, taken apart from the rest, so that all logits need never exist at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from hf_slim.core.modules import device_of, evaluating, temporary_hooks
from hf_slim.core.record import unwrapped

LARGE = 1024.0  # a cap on logits does not show where they are small
PROBE_LENGTH = 8


@dataclass(frozen=True)
class Split:
    """What is known of a model whose logits are just what its output layer makes of its input.

    Attributes:
        n_classes: Size of the vocabulary.
        shifted: Whether a position predicts the next label, as in causal models, or its own.
    """

    n_classes: int
    shifted: bool


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits of a language model's last states; None where there is none."""
    inner = unwrapped(model)
    return inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None


def shifts_labels(model: nn.Module) -> bool:
    """What a model whose output layer cannot be taken apart says about its loss."""
    inner = unwrapped(model)
    if output_layer(model) is None or getattr(inner.config, "is_encoder_decoder", False):
        return False
    return getattr(getattr(inner, "loss_function", None), "__name__", "") == "ForCausalLMLoss"  # GPT-2 names no type


@torch.no_grad()
def split_of(model: nn.Module) -> Split | None:
    """What one small forward pass on random tokens shows; None where the output layer cannot be taken apart.

    Logits that are capped or scaled after the layer, and losses with further terms (load balancing of experts), show
    and are left to the model.
    """
    head, inner = output_layer(model), unwrapped(model)
    if head is None or getattr(inner, "main_input_name", "") != "input_ids":
        return None
    device = device_of(inner)
    try:
        with evaluating(inner), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            ids = torch.randint(0, inner.config.get_text_config().vocab_size, (1, PROBE_LENGTH), device=device)
            return _split(inner, head, ids)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return None  # it does not run on tokens alone; if something is wrong with it, training will say so


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
    if getattr(outputs, "aux_loss", None) is not None:
        return None  # too small to be seen in the loss of a model that knows nothing yet
    logits, tolerance = outputs.logits.float(), max(1e-5, 2 * torch.finfo(outputs.loss.dtype).eps)
    for shifted in (True, False):
        answers, labels = (logits[:, :-1], ids[:, 1:]) if shifted else (logits, ids)
        if torch.isclose(
            outputs.loss.float(), F.cross_entropy(answers.flatten(0, 1), labels.flatten()), rtol=tolerance
        ):
            return Split(logits.shape[-1], shifted)
    return None


class HeadTap:
    """Keeps what enters the output layer during one forward pass.

    Args:
        model: Whose layer is looked up now: preparing a model replaces layers.
        narrow: Whether the layer is given one position instead of all, for a model whose logits nobody reads.
    """

    def __init__(self, model: nn.Module, narrow: bool):
        self.states: Tensor | None = None
        self._narrow = narrow
        self._handle: RemovableHandle = output_layer(model).register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.states = args[0]
        return (args[0][..., :1, :], *args[1:]) if self._narrow else args

    def close(self) -> None:
        """Leaves the layer as it was."""
        self._handle.remove()


class BackboneTap:
    """Keeps what the backbone returns in one forward pass of a model that does not call its output layer.

    TRL's trainers multiply by the layer's weights themselves: what leaves the backbone is what would enter the layer.
    """

    def __init__(self, model: nn.Module):
        self.outputs: Any = None
        self._handle: RemovableHandle = unwrapped(model).base_model.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: tuple, outputs: Any) -> None:
        self.outputs = outputs

    @property
    def states(self) -> Tensor:
        """`(batch, length, width)`."""
        return self.outputs.last_hidden_state

    def close(self) -> None:
        """Leaves the backbone as it was."""
        self._handle.remove()


@contextmanager
def head_tap(model: nn.Module, narrow: bool = True) -> Iterator[HeadTap]:
    """A `HeadTap` that is closed in the end."""
    tap = HeadTap(model, narrow)
    try:
        yield tap
    finally:
        tap.close()
