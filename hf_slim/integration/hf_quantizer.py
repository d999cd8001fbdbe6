"""The hook by which `from_pretrained` builds compressed models: an `HfQuantizer` registered under "hf_slim".

Folders in the formats of other libraries come to it as well, if hf_slim wrote them: their config.json carries a mark.
Imported whenever transformers is used after `import hf_slim`, so it imports nothing but the classes it extends.
"""

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
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

METHOD = "hf_slim"  # of slim folders, and in memory of every model that hf_slim has made
MARK = "hf_slim"  # where a folder in another format says what hf_slim needs to know
OTHER_METHODS = ("compressed-tensors", "gemma", "bitsandbytes_4bit")  # under which transformers looks up these formats
SWITCH = "HF_SLIM_PACKED"  # an environment variable; 0 leaves folders in other formats to transformers
SLIM = "slim"
MODES = ("pruned", "qat", "packed")
BYTE_FLOATS = ("F8", "float8")


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
        requires: The oldest hf_slim that reads the folder, for people.
        tied: Weights that the folder stores twice and the model once: later name -> first name.
        save_format: How the model is written: "slim", or a format of `integration/formats`.
        host: What config.json says to readers of that format.
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
        requires: str = "",
        tied: dict[str, str] | None = None,
        save_format: str = SLIM,
        host: dict[str, Any] | None = None,
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
        self.requires, self.tied, self.save_format, self.host = requires, tied or {}, save_format, host or {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a folder, in its own format or in another one with our mark."""
        values = dict(config_dict)
        if MARK in values:
            own = values.pop(MARK)
            if not isinstance(own, dict):
                raise SlimLoadError(f"`{MARK}` in `quantization_config` must be a mapping, got {type(own).__name__}.")
            values = own | {"save_format": values["quant_method"], "host": values}
        return super().from_dict(values, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What config.json says: our settings, or those of another format with ours under a mark."""
        own = copy.deepcopy(vars(self))
        for name in ("requires", "tied"):
            if not own[name]:
                del own[name]
        save_format, host = own.pop("save_format"), own.pop("host")
        if save_format == SLIM:
            return own
        del own["quant_method"]
        return host | {MARK: own}


class HfSlimQuantizer(HfQuantizer):
    """Resizes and replaces modules before the weights are loaded, so that the file fits the model exactly.

    The code is in `integration.rebuild`, which imports all of hf_slim. It is imported with the first checkpoint.
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
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            _rebuild().leave_to_file_(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        _rebuild().finish_(model, self.quantization_config)
        return model

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        """The conversions between checkpoint and model; of packed weights only those that rename, and the format's."""
        conversions = super().update_weight_conversions(weight_conversions, model)
        if self.quantization_config.mode == "packed":
            own = _files().conversions_of(self.quantization_config)
            conversions = _rebuild().of_whole_tensors(conversions) + own
        if self._weights is not None:
            expected = _files().expected_tensors(model, self.quantization_config)
            _rebuild().check_packed_tensors(model, expected, self._weights)
            _rebuild().check_tensors(model, conversions, self._weights)
            self._weights = None
        return conversions

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """What a tensor of the file is cast to; None for floats of one byte, which are codes here."""
        held = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype).removeprefix("torch.")
        return None if held.startswith(BYTE_FLOATS) else super().get_new_dtype(converter, param, dtype)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors as the model's format has them; None: as the model has them."""
        if self.quantization_config.save_format == SLIM:
            return None, {}
        return _files().file_tensors(model, self.quantization_config), {}

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
    """Makes "hf_slim" known to transformers, and our mark in folders of other formats; a second call does nothing."""
    if METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    register_quantization_config(METHOD)(HfSlimConfig)
    register_quantizer(METHOD)(HfSlimQuantizer)
    for method in OTHER_METHODS:
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _recognising(AUTO_QUANTIZATION_CONFIG_MAPPING[method])


def _recognising(host: Any) -> Any:
    """A config class of transformers that reads the folders of hf_slim as ours, and all others as before."""

    def from_dict(cls: type, config_dict: dict[str, Any], *arguments: Any, **kwargs: Any) -> Any:
        is_ours = MARK in config_dict and os.environ.get(SWITCH, "1") != "0"
        return (HfSlimConfig if is_ours else host).from_dict(config_dict, *arguments, **kwargs)

    return type(host.__name__, (host,), {"from_dict": classmethod(from_dict), "__doc__": host.__doc__})


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
    from hf_slim.integration import rebuild  # takes seconds, and only checkpoints of hf_slim need it

    return rebuild


def _files() -> ModuleType:
    from hf_slim.integration.formats import files

    return files
