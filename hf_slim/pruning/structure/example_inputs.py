"""A short dummy input for any model."""

import inspect

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.host import config_of, field_of

TOKENS = 3  # with one position, attention would not depend on the keys

PIXELS = ("pixel_values",)
ANY_SIZE = 64  # width and height of pictures for models that accept any size
SPECTROGRAMS = ("input_features",)
WAVES = ("input_values",)
SAMPLES = 3200  # samples of sound: a fifth of a second, several frames after the convolutions


def example_inputs(model: nn.Module, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Keyword arguments for one forward pass with random content: a text of a few tokens, a picture or a sound.

    A module that is not a Transformers model needs an attribute `dummy_inputs`.

    Args:
        tokens: Length of texts, at least 1.
    Raises: SlimError: if the inputs of the model are unknown.
    """
    config, name = config_of(model), field_of(model, "main_input_name")
    if config is None or name is None:
        own = field_of(model, "dummy_inputs")
        if not isinstance(own, dict):
            raise SlimError(
                f"The inputs of {type(model).__name__} are unknown, so its structure cannot be found by running it. "
                "Give it an example with one row: `model.dummy_inputs = {argument of forward: tensor}`."
            )
        return {argument: value.detach().cpu() for argument, value in own.items()}
    wanted = set(inspect.signature(model.forward).parameters)
    if name in PIXELS:
        size = field_of(config, "image_size") or ANY_SIZE
        height, width = size if isinstance(size, tuple | list) else (size, size)
        return {name: torch.rand(1, _first(config, "num_channels"), height, width)}
    if name in WAVES:
        return {name: torch.rand(1, SAMPLES)}
    if name in SPECTROGRAMS:
        inputs = {name: torch.rand(1, _first(config, "num_mel_bins"), 2 * _first(config, "max_source_positions"))}
    else:
        inputs = {"input_ids": _tokens(config, tokens)}
    if field_of(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _tokens(config, tokens)
    if "use_cache" in wanted:
        inputs["use_cache"] = False
    return inputs


def _tokens(config: object, count: int) -> Tensor:
    """Token ids without padding and other special tokens, which change how some models compute."""
    text = field_of(config, "get_text_config", lambda: config)()
    special = {field_of(text, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    ids = [token for token in range(min(text.vocab_size, 50)) if token not in special][:TOKENS]
    return torch.tensor([(ids * count)[:count]])


def _first(config: object, name: str) -> int:
    value = field_of(config, name)
    if value is None:
        raise SlimError(f"The config of this model has no `{name}`; pass `inputs` with an example.")
    return value
