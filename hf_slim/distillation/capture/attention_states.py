"""What enters the attention of chosen layers in one forward pass: queries, keys and values."""

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
from hf_slim.core.record import unwrapped

INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # how the modeling files of transformers call their table of attention functions
_LOCK = threading.Lock()

Attend = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class AttentionCall:
    """Everything else that one call of an attention function was given.

    Attributes:
        implementation: The model's choice, such as "sdpa"; None counts as "eager".
        eager: The model's own function that returns its probabilities.
        module: The attention module that called.
        mask: Boolean (True attends), additive, or None.
        args, kwargs: What followed.
    """

    implementation: str | None
    eager: Attend
    module: nn.Module
    mask: Tensor | None
    args: tuple
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class AttentionState:
    """One layer's states as they enter the attention function: after rotary embeddings, before heads are repeated.

    Attributes:
        query: `(batch, heads, length, head_dim)`.
        key: `(batch, kv_heads, length, head_dim)`.
        value: `(batch, kv_heads, length, value_dim)`.
        call: The rest of the call; None for states that no model made.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    call: AttentionCall | None = None

    def attention_map(self) -> Tensor:
        """The layer's attention probabilities before dropout, `(batch, heads, length, length)`, at least float32.

        Computed anew on every call by the model's own eager function, so that nothing of this size is held.

        Raises: SlimError: if the model runs another implementation than eager or sdpa: only their masks are known.
        """
        call = self.call
        if call is None:
            raise SlimError("These states were made by hand and know no mask. Record them with `attention_states`.")
        if call.implementation not in (None, "eager", "sdpa"):
            raise SlimError(
                f"Attention maps cannot be computed under the attention implementation '{call.implementation}'. Load "
                'the model with `attn_implementation="eager"` or "sdpa", or distil relations, which any allows.'
            )
        query, key, value = (_widened(tensor) for tensor in (self.query, self.key, self.value.detach()))
        kwargs = call.kwargs | {"dropout": 0.0}  # a dropped-out map is no distribution
        with torch.autocast(query.device.type, enabled=False):
            _, weights = call.eager(call.module, query, key, value, _additive_mask(call, query), *call.args, **kwargs)
        if weights is None:
            raise SlimError(f"{type(call.module).__name__} returns no attention maps. Distil relations instead.")
        return weights


@contextlib.contextmanager
def attention_states(model: nn.Module, layers: Sequence[int]) -> Iterator[list[AttentionState]]:
    """Records, while open, the states of chosen layers in one forward pass of `model` in this thread.

    Works with every attention implementation, and changes no value: the table from which the model takes its attention
    function hands out one that notes its arguments and goes on. Nothing is left behind, also after an exception.
    Gradients flow through the states, under (non-reentrant) gradient checkpointing as well: what it computes again in
    the backward pass is not recorded again.

    Args:
        model: Wrapped by adapters or not. Of an encoder-decoder model, the encoder is recorded; of one that sees and
            writes, pass the part that is meant (`model.language_model`).
        layers: Layers in the order in which their attentions are called, from 0; negative ones count from the end.
    Yields: A list that holds one state per entry of `layers`, in that order, once the context is closed.
    Raises: SlimError: if the model does not take its attention from transformers' table (DeBERTa, Falcon, Bloom
        and others with code of their own; GPT-J before transformers 5.24), has fewer layers, attends to something else
        than its input (cross attention, a filled cache), or runs under reentrant checkpointing, where no gradient
        would flow.
    """
    stack = _stack(unwrapped(model))
    interfaces = _interfaces(stack)
    if not interfaces:
        raise _outside(stack)
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

    def note(self, state: AttentionState) -> None:
        module = state.call.module
        if module not in self.modules:
            return
        if self.differentiable and self.stack.training and not torch.is_grad_enabled():
            raise SlimError(
                f"{type(module).__name__} runs without gradients inside of a training step, as reentrant gradient "
                "checkpointing does: attention could not be distilled. Pass "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
        if state.query.shape[-2] != state.key.shape[-2]:
            raise SlimError(
                f"{type(module).__name__} attends from {state.query.shape[-2]} positions to {state.key.shape[-2]}: "
                "cross attention or a filled cache, and only self-attention is recorded. Pass `use_cache=False`, or "
                "the part of the model that has self-attention alone."
            )
        if self.count in self.layers:
            self.kept[self.count] = state
        self.last.append(state)
        self.count += 1

    def chosen(self) -> list[AttentionState]:
        if not self.count:
            raise _outside(self.stack)
        for layer in self.layers:
            if not -self.count <= layer < self.count:
                raise SlimError(
                    f"Attention layer {layer} was asked for, and {type(self.stack).__name__} called {self.count} in "
                    f"its forward pass. Allowed: {-self.count} to {self.count - 1}."
                )
        return [self.kept[layer] if layer >= 0 else self.last[layer] for layer in self.layers]


class _Tap:
    """Stands in for an interface's `get_interface` while at least one recorder is open."""

    def __init__(self, interface: Any):
        self.replaced = vars(interface).get("get_interface")  # set by somebody else
        self.original = interface.get_interface
        self.recorders: tuple[_Recorder, ...] = ()

    def __call__(self, implementation: str | None, default: Attend) -> Attend:
        attend = self.original(implementation, default)
        recorders = [recorder for recorder in self.recorders if recorder.thread == threading.get_ident()]
        eager = attend if implementation in (None, "eager") else default

        def record(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args, **kwargs
        ) -> tuple[Tensor, Tensor | None]:
            # no arithmetic here: recomputation under checkpointing must save the very tensors that this pass saves
            call = AttentionCall(implementation, eager, module, attention_mask, args, kwargs)
            for recorder in recorders:
                recorder.note(AttentionState(query, key, value, call))
            return attend(module, query, key, value, attention_mask, *args, **kwargs)

        return record if recorders else attend


def _open(interface: Any, recorder: _Recorder) -> None:
    with _LOCK:
        tap = vars(interface).get("get_interface")
        if not isinstance(tap, _Tap):
            tap = interface.get_interface = _Tap(interface)
        tap.recorders = (*tap.recorders, recorder)


def _close(interface: Any, recorder: _Recorder) -> None:
    with _LOCK:
        tap = vars(interface).get("get_interface")
        if not isinstance(tap, _Tap):
            return
        tap.recorders = tuple(other for other in tap.recorders if other is not recorder)
        if not tap.recorders:
            del interface.get_interface
            if tap.replaced is not None:
                interface.get_interface = tap.replaced


def _stack(model: nn.Module) -> nn.Module:
    config = getattr(model, "config", None)
    two_stacks = getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_encoder")
    return model.get_encoder() if two_stacks else model


def _interfaces(stack: nn.Module) -> list[Any]:
    """The tables from which the model's files take attention functions: one for all, save where a file has its own."""
    files = {parent.__module__ for module in stack.modules() for parent in type(module).__mro__}
    tables = [getattr(sys.modules.get(name), INTERFACE, None) for name in sorted(files)]
    return list({id(table): table for table in tables if hasattr(table, "get_interface")}.values())


def _outside(stack: nn.Module) -> SlimError:
    return SlimError(
        f"The attention of {type(stack).__name__} cannot be recorded: its code does not take the attention function "
        "from transformers' AttentionInterface. Distil hidden states or logits instead, or choose an architecture "
        "whose code does (BERT, RoBERTa, ModernBERT, Llama, Qwen, Gemma, GPT-2, ...)."
    )


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _additive_mask(call: AttentionCall, query: Tensor) -> Tensor | None:
    """The mask as an eager function takes it; sdpa is given booleans, or none at all where causality says it all."""
    mask, length = call.mask, query.shape[-2]
    if call.implementation == "sdpa" and mask is None:
        causal = call.kwargs.get("is_causal")
        if causal if causal is not None else getattr(call.module, "is_causal", True):
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, lowest)
    return mask
