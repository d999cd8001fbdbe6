"""What a model takes when it is called: inputs to trace it with, and fresh ones to compare two forms of it."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_slim.core.contracts import PreparedHook
from hf_slim.core.errors import SlimError
from hf_slim.export.codes import weights_of
from hf_slim.integration.kv_cache import cache_argument, cache_of

TEXT = ("input_ids", "attention_mask", "token_type_ids")
POSITIONS = "position_ids"
IMAGE = "pixel_values"
# rows, cached tokens and new tokens differ, and none is 1: equal or single sizes would become constants of the graph
ROWS, CACHED, NEW = 2, 4, 3


@dataclass(frozen=True)
class Interface:
    """How a model is called.

    Attributes:
        names: The inputs of its forward that a graph takes, without the cache.
        cache: The name of its key-value cache among the inputs; None if the model runs in a single forward pass.
    """

    names: tuple[str, ...]
    cache: str | None = None


def interface_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Interface:
    """How the model is called: decoders with a cache, encoders and classifiers of text or images without.

    Raises: SlimError: for other models, and for caches that no graph holds.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise SlimError(
            f"{type(model).__name__} is an encoder-decoder, which would be two graphs; graphs are written for "
            "decoders, encoders and classifiers."
        )
    takes = inspect.signature(model.forward).parameters
    if model.main_input_name == IMAGE:
        return Interface((IMAGE,))
    if model.main_input_name != TEXT[0]:
        raise SlimError(
            f"{type(model).__name__} reads '{model.main_input_name}'; graphs are written for models that read text "
            f"('{TEXT[0]}') or images ('{IMAGE}')."
        )
    wanted = set(TEXT) if tokenizer is None else {*TEXT[:2], *tokenizer.model_input_names}
    names = tuple(name for name in TEXT if name in wanted and name in takes)
    argument = cache_argument(model) if model.can_generate() else None
    if argument is None:
        return Interface(names)
    _check_cache(model)
    return Interface((*names[:2], POSITIONS) if POSITIONS in takes else names[:2], argument)


def refusal_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Why no graph can be made of a model; "" if nothing is known to be in the way."""
    try:
        weights_of(model)
        interface_of(model, tokenizer)
    except SlimError as error:
        return str(error)
    return ""


def interface_from(names: Iterable[str], model: PreTrainedModel) -> Interface:
    """The interface of a graph that was traced with inputs of these names."""
    argument = cache_argument(model)
    held = tuple(names)
    return Interface(tuple(name for name in held if name != argument), argument if argument in held else None)


def example(model: PreTrainedModel, interface: Interface) -> dict[str, Any]:
    """Inputs to trace the model with: two rows, one of them padded, and for decoders a cache that holds tokens."""
    if interface.cache is None:
        inputs: dict[str, Any] = fresh(model, interface, ROWS, CACHED + NEW)
        return inputs | ({"use_cache": False} if hasattr(model.config, "use_cache") else {})
    prompt = fresh(model, interface, ROWS, CACHED)
    with torch.no_grad():
        cache = cache_of(model(**prompt, use_cache=True))
    return continued(interface, prompt, random_tokens(model, ROWS, NEW)) | {interface.cache: cache, "use_cache": True}


def fresh(model: PreTrainedModel, interface: Interface, rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of `rows` texts of up to `length` tokens, or of `rows` images; all but the first text are padded.

    Decoders are padded on the left, others on the right.
    """
    if interface.names == (IMAGE,):
        return {IMAGE: _images(model, rows, seed)}
    mask = torch.ones(rows, length, dtype=torch.long, device=model.device)
    padding = slice(0, 2) if interface.cache else slice(length - 2, length)
    mask[1:, padding] = 0
    inputs = {TEXT[0]: random_tokens(model, rows, length, seed), TEXT[1]: mask}
    if TEXT[2] in interface.names:
        kinds = getattr(model.config, "type_vocab_size", 1)
        inputs[TEXT[2]] = torch.arange(length, device=model.device).expand(rows, -1) * kinds // length
    if POSITIONS in interface.names:
        inputs[POSITIONS] = _positions(mask, length)
    return {name: inputs[name] for name in interface.names}


def continued(interface: Interface, inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """The inputs that follow `inputs` once those are in the cache: `tokens` of `(rows, new)`."""
    mask = torch.cat((inputs[TEXT[1]], torch.ones_like(tokens)), dim=1)
    following = {TEXT[0]: tokens, TEXT[1]: mask, POSITIONS: _positions(mask, tokens.shape[1])}
    return {name: following[name] for name in interface.names}


def empty_cache(model: PreTrainedModel, rows: int) -> Any:
    """A key-value cache without tokens whose tensors are there: `(rows, heads, 0, head size)` for every layer."""
    with torch.no_grad():
        cache = cache_of(model(input_ids=random_tokens(model, rows, 1), use_cache=True))
    cache.crop(-1)
    return cache


def random_tokens(model: PreTrainedModel, rows: int, length: int, seed: int = 0) -> Tensor:
    """Token ids `(rows, length)`, any of the vocabulary."""
    count = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, count, (rows, length), generator=generator).to(model.device)


def _images(model: PreTrainedModel, rows: int, seed: int) -> Tensor:
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (rows, model.config.num_channels, height, width)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.device, dtype)


def _positions(mask: Tensor, new: int) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)[:, -new:].contiguous()  # other strides would become part of the graph


def _check_cache(model: PreTrainedModel) -> None:
    """Raises SlimError unless the model keeps ordinary keys and values, which a graph can take and return."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    if any(isinstance(hook, PreparedHook) for hook in hooks):
        raise SlimError(
            "This model keeps its keys and values on an integer grid (`kv_cache`), and graphs keep them in floating "
            "point. Train it with `kv_cache: null`."
        )
    with torch.no_grad():
        cache = cache_of(model(input_ids=random_tokens(model, 1, 2), use_cache=True))
    layers = getattr(cache, "layers", None) or [cache]
    kinds = sorted({type(layer).__name__ for layer in layers if type(layer) not in _HELD})
    if kinds:
        raise SlimError(
            f"{type(model).__name__} keeps {', '.join(kinds)} between tokens; graphs are written for decoders whose "
            f"layers keep keys and values ({', '.join(kind.__name__ for kind in _HELD)})."
        )


_HELD = (DynamicLayer, DynamicSlidingWindowLayer)
