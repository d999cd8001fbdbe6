"""Describes prepared and converted models in their config, so that they can be saved and loaded again.

If a plain config can express the smaller shapes of a model, it becomes an ordinary checkpoint; otherwise a slim one,
whose config lists the differences.
"""

import copy
import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from hf_slim.core.adapters import adapter_layers, without_adapters
from hf_slim.core.errors import is_own_mistake
from hf_slim.core.host import config_of, config_value
from hf_slim.core.modules import counts, set_count_
from hf_slim.core.record import is_prepared, record_of, state_of
from hf_slim.integration.format_version import FORMAT_VERSION, OLDEST_READER
from hf_slim.integration.formats.choice import (
    AUTO,
    check_format,
    chosen_format,
    has_other_layout,
    packed_candidate,
)
from hf_slim.integration.formats.files import tie_on_disk_, untie_
from hf_slim.integration.formats.format import FORMATS, Candidate
from hf_slim.integration.formats.per_layer import forget_mirror_, mirror_sizes_
from hf_slim.integration.formats.remote_code import describe_remote_code_
from hf_slim.integration.hf_quantizer import SLIM, HfSlimConfig, HfSlimQuantizer
from hf_slim.integration.kv_cache import quantize_kv_cache_
from hf_slim.integration.rebuild import of_whole_tensors, share_tied_scales_
from hf_slim.integration.shapes import logical_shapes
from hf_slim.integration.trust.checksums import KEY, checksums
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.state import PruningState
from hf_slim.quantization.config import QuantizationConfig
from hf_slim.quantization.transform import is_packed, quantized_layers
from hf_slim.version import __version__


def check_saving(model: nn.Module, prepared: list[tuple[Any, Any]]) -> None:
    """Raises SlimConfigError if the format that a config asks for would not hold the result; before any training.

    Args:
        prepared: Configs that the model is about to be prepared with, each with what its technique's check has found.
    """
    configs = [*record_of(model).configs.values(), *(config for config, _ in prepared)]
    differ = any(isinstance(c, PruningConfig) and not all(c.uniform_by_kind.values()) for c in configs)
    for config, schemes in prepared:
        asked = isinstance(config, QuantizationConfig) and config.save_format not in (AUTO, SLIM)
        if asked and schemes and config_of(model) is not None:
            sizes = differ or any(differences(model))
            plain = _skeleton(model, config_of(model))
            named = {without_adapters(name): scheme for name, scheme in schemes.items()}
            candidate = Candidate(named, plain, config.learn != "lsq+", sizes, has_other_layout(plain))
            check_format(candidate, config.save_format)


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
    build = functools.partial(_skeleton, model)
    forget_mirror_(model)
    _shrink_plain_config(model)
    _update_copies_(model)
    if packed:
        _write_config(model, "packed")
        share_tied_scales_(model)
        _look_loaded_(model)
        wanted = record_of(model).applied.get("quantization", {}).get("save_format", AUTO)
        candidate = _candidate(model)
        mirror_sizes_(model, build)
        _save_in_(model, chosen_format(candidate, wanted).name, candidate)
    elif any(differences(model)):
        _write_config(model, "pruned")
        mirror_sizes_(model, build)
        describe_remote_code_(model, is_slim=True)
    else:
        describe_remote_code_(model, is_slim=False)
        if config_value(model, "quantization_config") is not None:
            config: Any = config_of(model)
            del config.quantization_config
            vars(config).pop(KEY, None)
    if isinstance(model, PreTrainedModel):
        model.add_model_tags(["hf_slim", *record_of(model).applied])  # of the card that `model.push_to_hub` makes


def save_as_(model: nn.Module, name: str) -> None:
    """Has `save_pretrained` write a packed model in another format from now on; its values stay as they are.

    Args:
        name: Of a format, or "auto".
    Raises: SlimConfigError: if the format does not hold the model exactly.
    """
    candidate = _candidate(model)
    check_format(candidate, name)
    _save_in_(model, chosen_format(candidate, name).name, candidate)


def _candidate(model: nn.Module) -> Candidate:
    skeleton = _skeleton(model, config_of(model))
    other_sizes = logical_shapes(skeleton) != logical_shapes(model, skeleton) or any(differences(model))
    return packed_candidate(model, skeleton, other_sizes)


def _save_in_(model: Any, name: str, candidate: Candidate) -> None:
    config = model.config.quantization_config
    if config.tied:  # as it was before it was loaded from a folder that stores weights twice
        tie_on_disk_(model, config.tied)
        config.tied = {}
    config.save_format, config.host = name, FORMATS[name].settings(candidate, model.dtype)
    tied = {path.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for path in pair}
    if not FORMATS[name].ties and tied & candidate.schemes.keys():
        config.tied = untie_(model)
    describe_remote_code_(model, is_slim=name == SLIM)
    setattr(model.config, KEY, checksums(config.to_dict()))


def _look_loaded_(model: Any) -> None:
    """Gives a packed model the attributes that `from_pretrained` would give it, so that it can be saved."""
    conversions = vars(model).get("_weight_conversions")
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = of_whole_tensors(conversions)
    model.hf_quantizer = HfSlimQuantizer(model.config.quantization_config)
    model.is_quantized, model.quantization_method = True, model.hf_quantizer.quantization_config.quant_method


def differences(model: nn.Module) -> tuple[dict[str, list[int]], dict[str, dict[str, int | float]]]:
    """The differences between the modules and a model that is built from the config: (shapes, attributes)."""
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
    """Whether a model that is built from the config has exactly these tensors: then it is an ordinary checkpoint."""
    skeleton = _skeleton(model, config_of(model))
    return logical_shapes(skeleton) == logical_shapes(model, skeleton) and not any(differences(model))


def _skeleton(model: nn.Module, config: Any) -> nn.Module:
    """The model that is built from the config, on the meta device."""
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
    described = HfSlimConfig(
        mode, shapes, attributes, layers, techniques, __version__, FORMAT_VERSION,
        requires="" if mode == "qat" else OLDEST_READER,
    )  # fmt: skip
    config.quantization_config = described
    setattr(config, KEY, checksums(described.to_dict()))


def _shrink_plain_config(model: nn.Module) -> None:
    """Writes smaller sizes into the config, if a model that is built from it is then exactly this model."""
    sizes: dict[str, Any] = state_of(model, PruningState).sizes
    if not sizes or not differences(model)[0]:
        return
    own: Any = config_of(model)
    config = copy.deepcopy(own)
    head_sizes = {value for (_, name), value in counts(model).items() if name == "head_dim"}
    if len(head_sizes) == 1 and not isinstance(getattr(type(config), "head_dim", None), property):
        sizes = sizes | {"head_dim": head_sizes.pop()}  # otherwise it would change with the number of heads
    for name, size in sizes.items():
        setattr(config, name, size)
    try:
        type(config).from_dict(config.to_dict())  # the class checks all fields together only in `from_dict`
        skeleton = _skeleton(model, config)
    except Exception as error:  # a config class raises any error for sizes that it does not accept
        if is_own_mistake(error):
            raise
        return
    if logical_shapes(skeleton) != logical_shapes(model, skeleton):
        return
    for (path, attribute), value in counts(skeleton).items():  # of the whole model, such as its number of experts
        if not path and not attribute.startswith("config."):
            set_count_(model, attribute, value)
    if _same_counts(skeleton, model):
        own.__dict__.update(config.__dict__)


def _update_copies_(model: nn.Module) -> None:
    """Updates the copies of the config that stacks and layers may have, if the config describes the model."""
    skeleton = _skeleton(model, config_of(model))
    if logical_shapes(skeleton) != logical_shapes(model, skeleton):
        return
    now = counts(model)
    for (path, attribute), value in counts(skeleton).items():
        if path and attribute.startswith("config.") and now.get((path, attribute), value) != value:
            set_count_(model.get_submodule(path), attribute, value)


def _same_counts(skeleton: nn.Module, model: nn.Module) -> bool:
    """Whether the modules of both models have the same sizes in their attributes; configs are not compared."""
    kinds = (int, float)  # also floats: Gemma scales its embeddings by the square root of their width
    expected = counts(skeleton, kinds)
    found = counts(model, kinds).items()
    # numbers about removed layers, such as a rotary embedding of their kind, do not matter
    return all(expected.get(key, value) == value for key, value in found if not key[1].startswith("config."))
