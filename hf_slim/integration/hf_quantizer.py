"""The hook by which `from_pretrained` builds compressed models: an `HfQuantizer` registered under "hf_slim"."""

from typing import Any

from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_slim.core.errors import SlimError
from hf_slim.core.lifecycle import claim
from hf_slim.core.modules import resolve
from hf_slim.core.record import record_of
from hf_slim.integration.format_version import check_format, unnumbered_format
from hf_slim.integration.kv_cache import quantize_kv_cache_
from hf_slim.integration.shapes import resize_, set_attribute_
from hf_slim.quantization.config import QuantizationConfig
from hf_slim.quantization.layers.packed import mark_filled_
from hf_slim.quantization.scheme import Scheme
from hf_slim.quantization.transform import empty_packed_layers_, fake_quantize_layers_

METHOD = "hf_slim"
MODES = ("pruned", "qat", "packed")


class HfSlimConfig(QuantizationConfigMixin):
    """What `config.json` says about a compressed model, under `quantization_config`.

    Args:
        mode: "pruned": only smaller; "qat": float masters with a fake-quantized forward; "packed": integer weights.
        shapes: Tensors whose shape differs from what the model's config says: path -> shape.
        attributes: Head counts that differ: path -> {attribute: value}.
        layers: Quantized layers: path -> scheme, by name ("w4a16-g32") or in full.
        techniques: The configs that made this model, by technique.
        version: Of hf_slim, when the model was made.
        format_version: Of the folder, see `integration/format_version.py`; None: a folder from before formats had
            numbers, whose format follows from the rest.
    Raises: SlimError: for a format, a mode or settings that this hf_slim does not know.
    """

    def __init__(
        self,
        mode: str = "",
        shapes: dict[str, list[int]] | None = None,
        attributes: dict[str, dict[str, int]] | None = None,
        layers: dict[str, str | dict] | None = None,
        techniques: dict[str, dict] | None = None,
        version: str = "",
        format_version: int | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ):
        if format_version is None:
            format_version = unnumbered_format(version, shapes or {})
        check_format(format_version, mode, layers or {}, version)
        if mode not in MODES or unknown:
            raise SlimError(
                f"This checkpoint was made by hf_slim {version or '?'} with mode '{mode}' and settings "
                f"{list(unknown)}, which this version does not know. Install a newer hf_slim."
            )
        self.quant_method = quant_method
        self.mode, self.shapes, self.attributes, self.layers = mode, shapes or {}, attributes or {}, layers or {}
        self.techniques, self.version, self.format_version = techniques or {}, version, format_version


class HfSlimQuantizer(HfQuantizer):
    """Resizes and swaps modules before the weights are loaded, so that the file fits the model exactly."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        record_of(model).applied = dict(config.techniques)
        for path, shape in config.shapes.items():
            resize_(model, path, shape)
        for path, values in config.attributes.items():
            for attribute, value in values.items():
                set_attribute_(model, path, attribute, value)
        schemes = {resolve(model, path): Scheme.of(scheme) for path, scheme in config.layers.items()}
        schemes.pop(None, None)
        if config.mode == "qat":
            quantization = QuantizationConfig.from_dict(config.techniques["quantization"])
            fake_quantize_layers_(model, schemes, quantization)
            claim(model, "quantization", quantization)
        elif config.mode == "packed":
            empty_packed_layers_(model, schemes)
            share_tied_scales_(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        quantize_kv_cache_(model)
        if self.quantization_config.mode == "packed":
            mark_filled_(model)
            share_tied_scales_(model)
        else:  # float weights: an ordinary, trainable model
            del model.hf_quantizer
            model.is_quantized = False
            for module in model.modules():
                if hasattr(getattr(module, "config", None), "_is_quantized"):
                    module.config._is_quantized = False
        return model

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        conversions = super().update_weight_conversions(weight_conversions, model)
        return of_whole_tensors(conversions) if self.quantization_config.mode == "packed" else conversions

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top of packed layers; the integers themselves stay

    @property
    def is_compileable(self) -> bool:
        return True


def of_whole_tensors(conversions: list) -> list:
    """The conversions between checkpoint and model that only rename: codes cannot be split, merged or transposed."""
    return [conversion for conversion in conversions if not isinstance(conversion, WeightConverter)]


def share_tied_scales_(model: nn.Module) -> None:
    """Lets a head whose packed weight is tied to the embedding use the embedding's scales too; stored once."""
    declared = getattr(model, "all_tied_weights_keys", {})  # weights are not tied yet while a checkpoint is loading
    for target, source in declared.items():
        head, owner = (model.get_submodule(path.rpartition(".")[0]) for path in (target, source))
        for buffer in ("weight_scale", "weight_zero_point"):
            if target.endswith(".weight") and hasattr(head, buffer) and hasattr(owner, buffer):
                head.register_buffer(buffer, getattr(owner, buffer), persistent=False)


def register() -> None:
    """Makes "hf_slim" known to transformers; a second call does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(HfSlimConfig)
        register_quantizer(METHOD)(HfSlimQuantizer)
