"""Builds the modules of a compressed checkpoint before its weights are read, and finishes them afterwards."""

from typing import Any

from torch import nn
from transformers.core_model_loading import WeightConverter

from hf_slim.core.contracts import PackedLayer
from hf_slim.core.errors import SlimLoadError
from hf_slim.core.files.json_file import AGAIN, shown
from hf_slim.core.files.model_folder import Weights
from hf_slim.core.host import config_of, field_of
from hf_slim.core.lifecycle import claim
from hf_slim.core.modules import resolve
from hf_slim.core.record import record_of
from hf_slim.integration.formats.files import ignore_leftovers_, share_scales_, tie_
from hf_slim.integration.formats.remote_code import carry_file_, points_to_file
from hf_slim.integration.hf_quantizer import HfSlimConfig
from hf_slim.integration.kv_cache import quantize_kv_cache_
from hf_slim.integration.shapes import resize_, set_attribute_
from hf_slim.integration.trust.schemes import quantization_settings, schemes_of
from hf_slim.integration.trust.settings import CODES_PER_BYTE
from hf_slim.integration.trust.tensors import check_packed_tensors, check_tensors
from hf_slim.quantization.layers.families import family_of
from hf_slim.quantization.layers.packed import mark_filled_
from hf_slim.quantization.scheme import Scheme
from hf_slim.quantization.transform import empty_packed_layers_, fake_quantize_layers_

__all__ = ["build_", "check_packed_tensors", "check_tensors", "finish_", "of_whole_tensors", "share_tied_scales_"]


def build_(model: nn.Module, config: HfSlimConfig, weights: Weights | None = None) -> None:
    """Changes the shapes and layers of a model without weights to those of the checkpoint that `config` describes.

    Args:
        weights: What the files of the checkpoint hold; None: unknown.
    Raises: SlimLoadError: for settings that do not fit the model or the files.
    """
    quantization = quantization_settings(config.techniques, config.mode == "qat")
    schemes = schemes_of(config.layers, None if weights is None else CODES_PER_BYTE * weights.size_bytes)
    record_of(model).applied = dict(config.techniques)
    for path, shape in config.shapes.items():
        resize_(model, path, shape)
    for path, values in config.attributes.items():
        for attribute, value in values.items():
            set_attribute_(model, path, attribute, value)
    schemes = _of_layers(model, schemes)
    if quantization is not None:
        fake_quantize_layers_(model, schemes, quantization, _declared_ties(model))
        claim(model, "quantization", quantization)
    elif config.mode == "packed":
        empty_packed_layers_(model, schemes)
        share_tied_scales_(model)
        ignore_leftovers_(model, config)


def finish_(model: nn.Module, config: HfSlimConfig) -> None:
    """Finishes a model after its weights are loaded: with packed layers, or as an ordinary trainable model."""
    quantize_kv_cache_(model)
    if points_to_file(model):
        carry_file_(model)
    if config.mode == "packed":
        mark_filled_(model)
        share_tied_scales_(model)
        tie_(model, config.tied)
        forget_conversions_(model)
    else:  # float weights: an ordinary, trainable model
        loaded: Any = model
        del loaded.hf_quantizer
        loaded.is_quantized = False
        for module in model.modules():
            held: Any = config_of(module)
            if field_of(held, "_is_quantized") is not None:
                held._is_quantized = False


def leave_to_file_(model: nn.Module) -> None:
    """Keeps transformers from initialising packed layers that stay on disk: it takes them for missing ones."""
    for module in model.modules():
        if isinstance(module, PackedLayer):
            vars(module)["_is_hf_initialized"] = True


def of_whole_tensors(conversions: list) -> list:
    """The conversions that only change names, because packed codes cannot be split, merged or transposed."""
    return [conversion for conversion in conversions if not isinstance(conversion, WeightConverter)]


def share_tied_scales_(model: nn.Module) -> None:
    """Shares the scales of the embedding with a head whose packed weight is tied to it; they are stored once."""
    declared = getattr(model, "all_tied_weights_keys", {})  # weights are not tied yet while a checkpoint is loading
    for target, source in declared.items():
        share_scales_(model, target, source)


def forget_conversions_(model: nn.Module) -> None:
    """Lets `save_pretrained` revert nothing but renamings: the tensors that it is handed are those of the file."""
    loaded: Any = model
    loaded._weight_conversions = of_whole_tensors(vars(model).get("_weight_conversions") or [])


def _declared_ties(model: nn.Module) -> dict[str, str]:
    """Modules whose `weight` will be that of another one: weights are not tied yet while a checkpoint is loading."""
    declared = getattr(model, "all_tied_weights_keys", {})
    return {
        target.removesuffix(".weight"): source.rpartition(".")[0]
        for target, source in declared.items()
        if target.endswith(".weight")
    }


def _of_layers(model: nn.Module, schemes: dict[str, Scheme]) -> dict[str, Scheme]:
    """The schemes by the paths that layers have in this model. Raises SlimLoadError for what cannot be quantized."""
    found = {}
    for name, scheme in schemes.items():
        path = resolve(model, name)
        if path is None:  # of a head, which this model does not have
            continue
        layer = model.get_submodule(path)
        if family_of(layer) is None:
            raise SlimLoadError(
                f"`quantization_config.layers` in config.json names {shown(name)}, a {type(layer).__name__}, which "
                f"has no weight that can be quantized. The folder is damaged, or was changed by hand. {AGAIN}"
            )
        found[path] = scheme
    return found
