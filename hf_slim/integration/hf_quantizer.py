"""The hook by which `from_pretrained` builds compressed models: an `HfQuantizer` registered under "hf_slim".

Imported whenever transformers is used after `import hf_slim`, so it imports nothing but the classes it extends.
"""

from collections.abc import Iterable
from pathlib import Path
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
from hf_slim.core.files.model_folder import Weights, check_config, check_model_folder, read_weights
from hf_slim.core.files.places import file_in
from hf_slim.integration.format_version import check_format, unnumbered_format
from hf_slim.integration.trust.checksums import KEY, check_checksums
from hf_slim.integration.trust.settings import check_sizes, check_types

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
        self.quant_method: Any = quant_method
        self.mode, self.shapes, self.attributes = mode, shapes or {}, attributes or {}
        self.layers, self.techniques, self.version = layers or {}, techniques or {}, version
        if format_version is not None:
            check_format(format_version, "", {}, str(version))  # first: a newer format may have other types
        check_types(vars(self))
        if format_version is None:
            format_version = unnumbered_format(version, self.shapes)
        check_format(format_version, mode, self.layers, version)
        if mode not in MODES or unknown:
            raise SlimLoadError(
                f"This checkpoint was made by hf_slim {version or '?'} with mode '{mode}' and settings "
                f"{list(unknown)}, which this version does not know. Install a newer hf_slim."
            )
        self.format_version = format_version


class HfSlimQuantizer(HfQuantizer):
    """Resizes and swaps modules before the weights are loaded, so that the file fits the model exactly.

    The work is done in `integration.rebuild`, which needs all of hf_slim and is imported with the first checkpoint.
    """

    requires_calibration = False
    quantization_config: Any  # a HfSlimConfig

    def __init__(self, quantization_config: HfSlimConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._weights: Weights | None = None  # between building the model and loading its weights
        _rebuild()  # imported before transformers changes the default device and dtype for the model it builds

    def update_attn_implementation(self, config: Any) -> Any:
        """The config unchanged: this is the first that a quantizer sees of it, and nothing is built or read yet."""
        check_checksums(self.quantization_config.to_dict(), getattr(config, KEY, None))
        folder = _folder_of(config)
        if folder is None or check_model_folder(folder) is None:
            check_config(config.to_dict(), None, f"{config.name_or_path}/config.json")
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if checkpoint_files:
            self._weights = read_weights(_checked_files(checkpoint_files, _folder_of(model.config)))
            check_sizes(self.quantization_config.shapes, self.quantization_config.attributes, self._weights)
        _rebuild().build_(model, self.quantization_config, self._weights)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        _rebuild().finish_(model, self.quantization_config)
        return model

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        """The conversions between checkpoint and model; of packed weights only those that rename."""
        conversions = super().update_weight_conversions(weight_conversions, model)
        if self.quantization_config.mode == "packed":
            conversions = _rebuild().of_whole_tensors(conversions)
        if self._weights is not None:
            _rebuild().check_tensors(model, conversions, self._weights)
            self._weights = None
        return conversions

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` may write the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the Trainer accepts the model: with adapters on packed layers, whose integers stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` works on the model."""
        return True


def register() -> None:
    """Makes "hf_slim" known to transformers; a second call does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(HfSlimConfig)
        register_quantizer(METHOD)(HfSlimQuantizer)


def _folder_of(config: Any) -> Path | None:
    """The folder that a model is loaded from; None for a Hub id."""
    name = config.name_or_path
    return Path(name) if name and Path(name).is_dir() else None


def _checked_files(files: list[str], folder: Path | None) -> Iterable[Path]:
    """The files of a checkpoint. Raises SlimLoadError for one outside of its folder, or not in safetensors."""
    for file in files:
        path = Path(file)
        if path.suffix != ".safetensors":
            raise SlimLoadError(
                f"hf_slim reads weights from safetensors alone, got '{path.name}'. Convert it where you trust it."
            )
        is_inside = folder is not None and path.is_relative_to(folder)
        yield (
            path
            if folder is None
            else file_in(folder, path.relative_to(folder).as_posix() if is_inside else file, folders=True)
        )


def _rebuild() -> ModuleType:
    from hf_slim.integration import rebuild  # seconds of imports, which only a checkpoint of ours needs

    return rebuild
