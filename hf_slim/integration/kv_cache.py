"""A key-value cache on an integer grid: rounded in training, stored as codes in `generate`."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_slim.core.contracts import PreparedHook
from hf_slim.core.errors import SlimError
from hf_slim.core.host import config_of
from hf_slim.core.record import record_of
from hf_slim.quantization.config import QuantizationConfig
from hf_slim.quantization.grids.fake_quant import fake_quantize_tokens
from hf_slim.quantization.grids.grid import Grid, GridState, decoded, encoded, observed_state
from hf_slim.quantization.grids.packing import pack_codes, unpack_codes

BITS = {"int8": 8, "int4": 4}
SCALE_BYTES = 4
ARGUMENTS = ("cache", "past_key_values")  # name of a forward's cache argument since transformers 5.24, and before


def cache_argument(model: nn.Module) -> str | None:
    """The name of the argument with which the forward of `model` takes a key-value cache; None if it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ARGUMENTS if name in parameters), None)


def cache_of(outputs: Any) -> Cache | None:
    """The key-value cache that a forward pass of a model of transformers has returned; None if it returned none."""
    found = (outputs[name] for name in ARGUMENTS if name in outputs)
    return next(found, None)


def quantize_kv_cache_(model: nn.Module) -> None:
    """Makes the attention of a prepared or loaded model use keys and values that are rounded to its config's grid.

    Each token of each head has its own scale. Any decoder with a `DynamicCache` is supported, with any attention.
    Raises: SlimError: if the model has no such cache.
    """
    record = record_of(model)
    settings = record.configs.get("quantization")
    name = settings.kv_cache if isinstance(settings, QuantizationConfig) else None
    name = name or record.applied.get("quantization", {}).get("kv_cache")
    if name is None:
        return
    decoder = getattr(model, "base_model", model)
    hooks = decoder._forward_pre_hooks.values()
    if not any(isinstance(hook, _UseQuantizedCache) for hook in hooks):
        hook = _UseQuantizedCache(BITS[name], _argument_of(model, decoder))
        decoder.register_forward_pre_hook(hook, with_kwargs=True)


class QuantizedLayer(DynamicLayer):
    """Keys and values of one layer as codes with their scale: int8 `(batch, heads, tokens, n_bytes + 4)`.

    The bytes of the scale are stored after those of the codes, so that cropping, reordering and repeating need no
    extra code.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.grid = Grid(bits=bits, granularity="token")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Creates empty storage for codes on the device of the first keys."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = (torch.tensor([], dtype=torch.int8, device=self.device) for _ in range(2))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds the newest tokens as codes; returns keys and values of all tokens, dequantized."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stored: Any = self  # transformers declares both as optional, and they are tensors from here on
        self.keys = torch.cat((stored.keys, self._packed(key_states)), dim=-2)
        self.values = torch.cat((stored.values, self._packed(value_states)), dim=-2)
        return self._unpacked(self.keys, key_states), self._unpacked(self.values, value_states)

    def _packed(self, states: Tensor) -> Tensor:
        values = states.float()
        state = observed_state(values, self.grid)
        codes = pack_codes(encoded(values, self.grid, state), self.grid.storage_bits)
        return torch.cat((codes, state.scale.contiguous().view(torch.int8)), dim=-1)

    def _unpacked(self, packed: Tensor, like: Tensor) -> Tensor:
        """All tokens, with size and dtype of the newest ones; these differ between keys and values in some models."""
        codes = unpack_codes(packed[..., :-SCALE_BYTES].contiguous(), self.grid.storage_bits, like.shape[-1])
        scale = packed[..., -SCALE_BYTES:].contiguous().view(torch.float32)
        return decoded(codes, self.grid, GridState(scale)).to(like.dtype)


class _RoundingLayer(DynamicLayer):
    """Stores nothing, and returns the keys and values that a `QuantizedLayer` would return, for training."""

    def __init__(self, bits: int):
        super().__init__()
        self.grid = Grid(bits=bits, granularity="token")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The newest keys and values, rounded to the grid; differentiable."""
        return fake_quantize_tokens(key_states, self.grid), fake_quantize_tokens(value_states, self.grid)


class _UseQuantizedCache(PreparedHook):
    """A forward pre-hook that puts quantized layers into the empty cache of a decoder.

    Args:
        argument: The name under which the decoder takes its cache, one of `ARGUMENTS`.
    """

    def __init__(self, bits: int, argument: str):
        self.bits, self.argument = bits, argument

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        for old in ARGUMENTS[ARGUMENTS.index(self.argument) + 1 :]:  # its forward also accepts the older names
            if old in kwargs:
                kwargs.setdefault(self.argument, kwargs.pop(old))
        config: Any = config_of(decoder)
        cache, n_layers = kwargs.get(self.argument), config.get_text_config().num_hidden_layers
        use_cache = kwargs.get("use_cache")
        use_cache = config.use_cache if use_cache is None else use_cache
        if decoder.training and getattr(decoder, "is_gradient_checkpointing", False):
            raise SlimError(
                "Gradient checkpointing disables the key-value cache, and so the rounding of keys and values. "
                "Set `gradient_checkpointing: false`, or `kv_cache: null`."
            )
        if cache is None:
            trains = torch.is_grad_enabled() or not use_cache
            layer = _RoundingLayer if trains else QuantizedLayer
            kwargs[self.argument] = Cache(layers=[layer(self.bits) for _ in range(n_layers)])
        elif not all(isinstance(layer, QuantizedLayer | _RoundingLayer) for layer in cache.layers) or not cache.layers:
            self._take_over_(cache, n_layers)
        return args, kwargs

    def _take_over_(self, cache: Cache, n_layers: int) -> None:
        unused = all(type(layer) is DynamicLayer and not layer.is_initialized for layer in cache.layers)
        if not isinstance(cache, DynamicCache) or not unused:
            kinds = sorted({type(layer).__name__ for layer in cache.layers})
            raise SlimError(
                f"This model rounds keys and values to an {self.bits}-bit grid, which needs an empty DynamicCache; "
                f"got {type(cache).__name__} with {', '.join(kinds) or 'no layers'}. Call `generate` without "
                f"`cache_implementation` and without a filled `{self.argument}`."
            )
        cache.layers = [QuantizedLayer(self.bits) for _ in range(n_layers)]


def _argument_of(model: nn.Module, decoder: nn.Module) -> str:
    """The name of a decoder's cache argument. Raises SlimError if it has no cache that can be quantized."""
    config, argument = getattr(model, "config", None), cache_argument(decoder)
    attends = any(getattr(module, "is_causal", False) for module in model.modules())  # BERT ignores a cache
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    is_usable = config is not None and not config.is_encoder_decoder and types == {"full_attention"}
    if argument is None or not attends or not is_usable:
        raise SlimError(
            f"`kv_cache` needs a decoder whose layers all keep full keys and values; {type(model).__name__} has "
            f"{'layers of ' + ', '.join(sorted(types)) if types != {'full_attention'} else 'no such cache'}. Drop "
            "`kv_cache`."
        )
    return argument
