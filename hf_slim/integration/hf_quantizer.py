"""The hook by which `from_pretrained` builds compressed models: an `HfQuantizer` registered under "hf_slim".

Imported whenever transformers is used after `import hf_slim`, so it imports nothing but the classes it extends.
"""

from types import ModuleType
from typing import Any

from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_slim.core.errors import SlimLoadError
from hf_slim.integration.format_version import check_format, unnumbered_format

METHOD = "hf_slim"
MODES = ("pruned", "qat", "packed")


class HfSlimConfig(QuantizationConfigMixin):
    """The description of a compressed model in `config.json`, under `quantization_config`.

    Args:
        mode: "pruned": only smaller; "qat": float masters with a fake-quantized forward; "packed": integer weights.
        shapes: Tensors with other shapes than in the model's config: path -> shape.
        attributes: Head counts that differ: path -> {attribute: value}.
        layers: Quantized layers: path -> scheme, by name ("w4a16-g32") or in full.
        techniques: The configs that made this model, by technique.
        version: Of hf_slim, when the model was made.
        format_version: Of the folder, see `integration/format_version.py`; None: a folder from before formats had
            numbers, whose format follows from the rest.
    Raises: SlimError: for a format, a mode or settings that this version does not support.
    """

    def __init__(  # noqa: PLR0913  one argument per key of config.json
        self,
        mode: str = "",
        shapes: dict[str, list[int]] | None = None,
        attributes: dict[str, dict[str, int | float]] | None = None,
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
            raise SlimLoadError(
                f"This checkpoint was made by hf_slim {version or '?'} with mode '{mode}' and settings "
                f"{list(unknown)}, which this version does not know. Install a newer hf_slim."
            )
        self.quant_method: Any = quant_method
        self.mode, self.shapes, self.attributes, self.layers = mode, shapes or {}, attributes or {}, layers or {}
        self.techniques, self.version, self.format_version = techniques or {}, version, format_version


class HfSlimQuantizer(HfQuantizer):
    """Resizes and replaces modules before the weights are loaded, so that the file fits the model exactly.

    The code is in `integration.rebuild`, which imports all of hf_slim. It is imported with the first checkpoint.
    """

    requires_calibration = False
    quantization_config: Any  # a HfSlimConfig

    def __init__(self, quantization_config: HfSlimConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        _rebuild()  # imported before transformers changes the default device and dtype for the model it builds

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        _rebuild().build_(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        _rebuild().finish_(model, self.quantization_config)
        return model

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        """The conversions between checkpoint and model; for packed weights only conversions of names."""
        conversions = super().update_weight_conversions(weight_conversions, model)
        return _rebuild().of_whole_tensors(conversions) if self.quantization_config.mode == "packed" else conversions

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` may write the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the Trainer accepts the model: with adapters on packed layers, whose codes are not trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` works on the model."""
        return True


def register() -> None:
    """Registers "hf_slim" with transformers; a second call does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(HfSlimConfig)
        register_quantizer(METHOD)(HfSlimQuantizer)


def _rebuild() -> ModuleType:
    from hf_slim.integration import rebuild  # takes seconds, and only checkpoints of hf_slim need it

    return rebuild
