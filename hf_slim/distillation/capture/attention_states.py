"""Recording the queries, keys and values of chosen attention layers in one forward pass."""

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.host import config_value, method_or_none
from hf_slim.core.record import unwrapped

INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # name of the table of attention functions in modeling files of transformers
_LOCK = threading.Lock()

Attend = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class AttentionCall:
    """All arguments of one call of an attention function, except queries, keys and values.

    Attributes:
        implementation: The model's attention implementation, such as "sdpa"; None means "eager".
        eager: The model's eager attention function, which returns the probabilities.
        module: The attention module that made the call.
        mask: Boolean (True: attend), additive, or None.
        args: Further positional arguments.
        kwargs: Further keyword arguments.
    """

    implementation: str | None
    eager: Attend
    module: nn.Module
    mask: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class AttentionState:
    """Inputs of one layer's attention function, after rotary embeddings and before heads are repeated.

    Attributes:
        query: `(batch, heads, length, head_dim)`.
        key: `(batch, kv_heads, length, head_dim)`.
        value: `(batch, kv_heads, length, value_dim)`.
        call: The other arguments of the call; None for states that were not recorded from a model.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    call: AttentionCall | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Queries, keys and values by name."""
        return {"query": self.query, "key": self.key, "value": self.value}

    def attention_map(self) -> Tensor:
        """Attention probabilities of the layer before dropout, `(batch, heads, length, length)`, float32 or float64.

        Every call computes them with the model's own eager function; they are not kept.

        Raises: SlimError: if the model's implementation is not eager or sdpa, whose masks are the only ones known.
        """
        call = self.call
        if call is None:
            raise SlimError(
                "These states were not recorded from a model, so their mask is unknown. Record them with "
                "`attention_states`."
            )
        if call.implementation not in (None, "eager", "sdpa"):
            raise SlimError(
                f"Attention maps cannot be computed under the attention implementation '{call.implementation}'. Load "
                'the model with `attn_implementation="eager"` or "sdpa", or set `attention.loss: relations`, which '
                "works with every implementation."
            )
        query, key, value = (_widened(tensor) for tensor in (self.query, self.key, self.value.detach()))
        kwargs = call.kwargs | {"dropout": 0.0}  # with dropout the rows would not sum to 1
        with torch.autocast(query.device.type, enabled=False):
            _, weights = call.eager(call.module, query, key, value, _additive_mask(call, query), *call.args, **kwargs)
        if weights is None:
            raise SlimError(
                f"{type(call.module).__name__} returns no attention maps. Set `attention.loss: relations`."
            )
        return weights


@contextlib.contextmanager
def attention_states(model: nn.Module, layers: Sequence[int]) -> Iterator[list[AttentionState]]:
    """Record the states of chosen layers in one forward pass of `model` in this thread, while the context is open.

    Works with every attention implementation and changes no value. While the context is open, transformers' table of
    attention functions returns functions that record their arguments; afterwards the table is as before, also after an
    exception. The states carry gradients, also under non-reentrant gradient checkpointing, whose recomputation in the
    backward pass is not recorded.

    Args:
        model: With or without adapters. Of an encoder-decoder model, the encoder is recorded; of a vision-language
            model, pass the part that is meant (`model.language_model`).
        layers: Layers in the order of their attention calls, from 0; negative numbers count from the end.
    Yields: a list, filled when the context closes: one state per entry of `layers`, in the same order.
    Raises: SlimError: if the model does not take its attention from transformers' table (DeBERTa, Falcon, Bloom
        and others with custom code; GPT-J before transformers 5.24), has fewer layers, uses cross attention or
        a filled cache, or runs under reentrant checkpointing, which computes no gradient for the states.
    """
    stack = _stack(unwrapped(model))
    interfaces = _interfaces(stack)
    if not interfaces:
        raise _not_recordable(stack)
    recorder, states = _Recorder(stack, layers), []
    try:
        for interface in interfaces:
            _open(interface, recorder)
        yield states
    finally:
        for interface in interfaces:
            _close(interface, recorder)
    states.extend(recorder.chosen())


class _Recorder:
    def __init__(self, stack: nn.Module, layers: Sequence[int]):
        self.stack = stack
        self.layers = list(layers)
        self.modules = set(stack.modules())
        self.thread = threading.get_ident()
        self.differentiable = torch.is_grad_enabled()
        self.count = 0
        self.kept: dict[int, AttentionState] = {}
        self.last: deque[AttentionState] = deque(maxlen=max(0, -min(self.layers, default=0)))

    def record(self, state: AttentionState) -> None:
        module = state.call.module
        if module not in self.modules:
            return
        if self.differentiable and self.stack.training and not torch.is_grad_enabled():
            raise SlimError(
                f"{type(module).__name__} runs without gradients in a training step, as it does under reentrant "
                "gradient checkpointing, so the loss on attention would have no gradient. Pass "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
        if state.query.shape[-2] != state.key.shape[-2]:
            raise SlimError(
                f"{type(module).__name__} attends from {state.query.shape[-2]} positions to {state.key.shape[-2]}, "
                "which is cross attention or a filled cache. Only self-attention is recorded. Pass `use_cache=False`, "
                "or the part of the model that has only self-attention."
            )
        if self.count in self.layers:
            self.kept[self.count] = state
        self.last.append(state)
        self.count += 1

    def chosen(self) -> list[AttentionState]:
        if not self.count:
            raise _not_recordable(self.stack)
        for layer in self.layers:
            if not -self.count <= layer < self.count:
                raise SlimError(
                    f"`layers` names attention layer {layer}, and {type(self.stack).__name__} called {self.count} "
                    f"attention layers in its forward pass. Allowed: {-self.count} to {self.count - 1}."
                )
        return [self.kept[layer] if layer >= 0 else self.last[layer] for layer in self.layers]


class _InterfaceCapture:
    """Replaces an interface's `get_interface` while at least one recorder is open."""

    def __init__(self, interface: Any):
        self.replaced = vars(interface).get("get_interface")  # a replacement by other code
        self.original = interface.get_interface
        self.recorders: tuple[_Recorder, ...] = ()

    def __call__(self, implementation: str | None, default: Attend) -> Attend:
        attend = self.original(implementation, default)
        recorders = [recorder for recorder in self.recorders if recorder.thread == threading.get_ident()]
        eager = attend if implementation in (None, "eager") else default

        def record(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
            *args: Any, **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
            # no arithmetic here: under checkpointing the recomputation must save the same tensors as this pass
            call = AttentionCall(implementation, eager, module, attention_mask, args, kwargs)
            for recorder in recorders:
                recorder.record(AttentionState(query, key, value, call))
            return attend(module, query, key, value, attention_mask, *args, **kwargs)

        return record if recorders else attend


def _open(interface: Any, recorder: _Recorder) -> None:
    with _LOCK:
        capture = vars(interface).get("get_interface")
        if not isinstance(capture, _InterfaceCapture):
            capture = interface.get_interface = _InterfaceCapture(interface)
        capture.recorders = (*capture.recorders, recorder)


def _close(interface: Any, recorder: _Recorder) -> None:
    with _LOCK:
        capture = vars(interface).get("get_interface")
        if not isinstance(capture, _InterfaceCapture):
            return
        capture.recorders = tuple(other for other in capture.recorders if other is not recorder)
        if not capture.recorders:
            del interface.get_interface
            if capture.replaced is not None:
                interface.get_interface = capture.replaced


def _stack(model: nn.Module) -> nn.Module:
    encoder = method_or_none(model, "get_encoder")
    return encoder() if config_value(model, "is_encoder_decoder", False) and encoder is not None else model


def _interfaces(stack: nn.Module) -> list[Any]:
    """Tables from which the model's files take attention functions: usually one, but a file can have its own."""
    files = {parent.__module__ for module in stack.modules() for parent in type(module).__mro__}
    tables = [vars(sys.modules[name]).get(INTERFACE) for name in sorted(files) if name in sys.modules]
    return list({id(table): table for table in tables if method_or_none(table, "get_interface")}.values())


def _not_recordable(stack: nn.Module) -> SlimError:
    return SlimError(
        f"The attention of {type(stack).__name__} cannot be recorded: its code does not take the attention function "
        "from transformers' AttentionInterface. Compare hidden states or logits instead, or choose an architecture "
        "whose code does (BERT, RoBERTa, ModernBERT, Llama, Qwen, Gemma, GPT-2, ...)."
    )


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _additive_mask(call: AttentionCall, query: Tensor) -> Tensor | None:
    """Additive mask for an eager function. Under sdpa the mask is boolean, or None with `is_causal` instead."""
    mask, length = call.mask, query.shape[-2]
    if call.implementation == "sdpa" and mask is None:
        causal = call.kwargs.get("is_causal")
        if causal if causal is not None else getattr(call.module, "is_causal", True):
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, lowest)
    return mask
