"""What a prepared or converted model says about itself in its config, so that it can be saved and loaded back.

A model whose smaller shapes a plain config can express becomes an ordinary checkpoint; anything else becomes a slim
one, whose config lists what differs.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from hf_slim.core.adapters import adapter_layers
from hf_slim.core.errors import is_own_mistake
from hf_slim.core.modules import config_of, config_value, counts, set_count_
from hf_slim.core.record import is_prepared, record_of, state_of
from hf_slim.integration.format_version import FORMAT_VERSION
from hf_slim.integration.hf_quantizer import HfSlimConfig, HfSlimQuantizer
from hf_slim.integration.kv_cache import quantize_kv_cache_
from hf_slim.integration.rebuild import of_whole_tensors, share_tied_scales_
from hf_slim.integration.shapes import logical_shapes
from hf_slim.integration.trust.checksums import KEY, checksums
from hf_slim.pruning.state import PruningState
from hf_slim.quantization.transform import is_packed, quantized_layers
from hf_slim.version import __version__


def describe_prepared(model: nn.Module) -> None:
    """Writes mode "qat" into the config of a model prepared for quantization: its checkpoints load as such."""
    quantize_kv_cache_(model)
    if is_prepared(model, "quantization") and config_of(model) is not None and not adapter_layers(model):
        _write_config(model, "qat")


def describe_converted(model: nn.Module) -> None:
    """Writes the config of a converted model, plain if possible, and makes it what `from_pretrained` would return."""
    if config_of(model) is None:
        return
    packed = any(is_packed(module) for module in model.modules())
    _shrink_plain_config(model)
    _settle_copies_(model)
    if packed:
        _write_config(model, "packed")
        share_tied_scales_(model)
        _look_loaded_(model)
    elif any(differences(model)):
        _write_config(model, "pruned")
    elif config_value(model, "quantization_config") is not None:
        config: Any = config_of(model)
        del config.quantization_config
        vars(config).pop(KEY, None)


def _look_loaded_(model: Any) -> None:
    """Gives a packed model the attributes that `from_pretrained` would give it, so that it can be saved."""
    conversions = vars(model).get("_weight_conversions")
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = of_whole_tensors(conversions)
    model.hf_quantizer = HfSlimQuantizer(model.config.quantization_config)
    model.is_quantized, model.quantization_method = True, model.hf_quantizer.quantization_config.quant_method


def differences(model: nn.Module) -> tuple[dict[str, list[int]], dict[str, dict[str, int | float]]]:
    """Where the modules differ from what the model's config alone would build: (shapes, attributes)."""
    skeleton = _skeleton(model, config_of(model))
    expected, found = logical_shapes(skeleton), logical_shapes(model, skeleton)
    shapes = {path: shape for path, shape in found.items() if expected.get(path, shape) != shape}
    plain = counts(skeleton)
    attributes: dict[str, dict[str, int | float]] = {}
    for (path, attribute), value in counts(model).items():
        if plain.get((path, attribute), value) != value:
            attributes.setdefault(path, {})[attribute] = value
    return shapes, attributes


def is_plain(model: nn.Module) -> bool:
    """Whether the model's config alone builds a model of exactly these tensors: an ordinary checkpoint."""
    skeleton = _skeleton(model, config_of(model))
    return logical_shapes(skeleton) == logical_shapes(model, skeleton) and not any(differences(model))


def _skeleton(model: nn.Module, config: Any) -> nn.Module:
    """The model as its config alone describes it, without memory."""
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        config.quantization_config = None
    with torch.device("meta"):
        return type(model)(config)


def _write_config(model: nn.Module, mode: str) -> None:
    shapes, attributes = differences(model)
    layers = {name: scheme.to_json() for name, scheme in quantized_layers(model).items()}
    record = record_of(model)
    techniques = record.applied | {name: config.to_dict() for name, config in record.configs.items()}
    config: Any = config_of(model)
    described = HfSlimConfig(mode, shapes, attributes, layers, techniques, __version__, FORMAT_VERSION)
    config.quantization_config = described
    setattr(config, KEY, checksums(described.to_dict()))


def _shrink_plain_config(model: nn.Module) -> None:
    """Puts smaller sizes into the config's own fields, where the config then builds exactly this model."""
    sizes: dict[str, Any] = state_of(model, PruningState).sizes
    if not sizes or not differences(model)[0]:
        return
    own: Any = config_of(model)
    config = copy.deepcopy(own)
    head_sizes = {value for (_, name), value in counts(model).items() if name == "head_dim"}
    if len(head_sizes) == 1 and not isinstance(getattr(type(config), "head_dim", None), property):
        sizes = sizes | {"head_dim": head_sizes.pop()}  # otherwise it would follow from the number of heads
    for name, size in sizes.items():
        setattr(config, name, size)
    try:
        type(config).from_dict(config.to_dict())  # its class checks all fields together only when it is read
        skeleton = _skeleton(model, config)
    except Exception as error:  # a config class refuses sizes that it finds illegal: then the folder is a slim one
        if is_own_mistake(error):
            raise
        return
    if logical_shapes(skeleton) != logical_shapes(model, skeleton):
        return
    for (path, attribute), value in counts(skeleton).items():  # what the model as a whole counts, such as its experts
        if not path and not attribute.startswith("config."):
            set_count_(model, attribute, value)
    if _same_counts(skeleton, model):
        own.__dict__.update(config.__dict__)


def _settle_copies_(model: nn.Module) -> None:
    """Makes the copies of the config that stacks and layers may hold say the same, where it describes the model."""
    skeleton = _skeleton(model, config_of(model))
    if logical_shapes(skeleton) != logical_shapes(model, skeleton):
        return
    now = counts(model)
    for (path, attribute), value in counts(skeleton).items():
        if path and attribute.startswith("config.") and now.get((path, attribute), value) != value:
            set_count_(model.get_submodule(path), attribute, value)


def _same_counts(skeleton: nn.Module, model: nn.Module) -> bool:
    """Whether modules of both know the same sizes; the configs they share are what is being written."""
    kinds = (int, float)  # floats too: Gemma scales its embeddings by the root of their width
    expected = counts(skeleton, kinds)
    found = counts(model, kinds).items()
    # numbers about removed layers, such as a rotary embedding of their kind, do not matter
    return all(expected.get(key, value) == value for key, value in found if not key[1].startswith("config."))
