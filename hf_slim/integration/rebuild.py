"""Builds the modules of a compressed checkpoint before its weights are read, and finishes them afterwards."""

from typing import Any

from torch import nn
from transformers.core_model_loading import WeightConverter

from hf_slim.core.contracts import PackedLayer
from hf_slim.core.host import config_of, field_of
from hf_slim.core.lifecycle import claim
from hf_slim.core.modules import resolve
from hf_slim.core.record import record_of
from hf_slim.integration.formats.files import ignore_leftovers_, share_scales_, tie_
from hf_slim.integration.formats.remote_code import carry_file_, points_to_file
from hf_slim.integration.hf_quantizer import HfSlimConfig
from hf_slim.integration.kv_cache import quantize_kv_cache_
from hf_slim.integration.shapes import resize_, set_attribute_
from hf_slim.quantization.config import QuantizationConfig
from hf_slim.quantization.layers.packed import mark_filled_
from hf_slim.quantization.scheme import Scheme
from hf_slim.quantization.transform import empty_packed_layers_, fake_quantize_layers_


def build_(model: nn.Module, config: HfSlimConfig) -> None:
    """Changes the shapes and layers of a model without weights to those of the checkpoint that `config` describes."""
    record_of(model).applied = dict(config.techniques)
    for path, shape in config.shapes.items():
        resize_(model, path, shape)
    for path, values in config.attributes.items():
        for attribute, value in values.items():
            set_attribute_(model, path, attribute, value)
    found = ((resolve(model, path), scheme) for path, scheme in config.layers.items())
    schemes = {path: Scheme.of(scheme) for path, scheme in found if path is not None}
    if config.mode == "qat":
        quantization = QuantizationConfig.from_dict(config.techniques["quantization"])
        fake_quantize_layers_(model, schemes, quantization)
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
