"""The code that a slim folder carries: with `trust_remote_code=True` it loads without `import hf_slim` before.

`config.json` points the Auto classes of transformers to a file of two lines, which imports hf_slim and the classes
below. They hand everything on to the Auto class of the same name, so no class of transformers becomes a custom one.
Without `trust_remote_code` transformers ignores the file.
"""

import os
from pathlib import Path
from types import MethodType
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_slim.core.adapters import adapter_layers
from hf_slim.core.host import config_of, field_of
from hf_slim.integration.format_version import OLDEST_READER
from hf_slim.integration.hf_quantizer import SLIM

MODULE = "modeling_hf_slim"
FILE = f"{MODULE}.py"


def describe_remote_code_(model: nn.Module, is_slim: bool) -> None:
    """Has the folders of a model carry the file if they are slim ones, and not if they are of another format.

    A model that brings code of its own keeps it, without ours.
    """
    config: Any = config_of(model)
    existing = field_of(config, "auto_map") or {}
    if any(not str(target).startswith(f"{MODULE}.") for target in existing.values()):
        return
    if is_slim and isinstance(model, PreTrainedModel):
        config.auto_map = {name: f"{MODULE}.{name}" for name in auto_classes(model)}
        carry_file_(model)
    elif existing:
        del config.auto_map


def carry_file_(model: nn.Module) -> None:
    """Lets `save_pretrained` of this model write the file too: no hook of transformers is told the folder."""
    vars(model)["save_pretrained"] = MethodType(save_pretrained, model)


def save_pretrained(self: Any, save_directory: str | os.PathLike, *arguments: Any, **settings: Any) -> Any:
    """`PreTrainedModel.save_pretrained`, and the file of two lines if config.json points to it."""
    is_writer = settings.get("is_main_process", True) and not os.path.isfile(save_directory)
    if is_writer and points_to_file(self):
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / FILE).write_text(file_text(sorted(self.config.auto_map)))
    return type(self).save_pretrained(self, save_directory, *arguments, **settings)


def points_to_file(model: nn.Module) -> bool:
    """Whether the model's config points the Auto classes to our file."""
    targets = field_of(config_of(model), "auto_map") or {}
    saved = field_of(config_of(model), "quantization_config")
    is_slim = field_of(saved, "save_format", SLIM) == SLIM
    return (
        is_slim
        and not adapter_layers(model)
        and any(str(target).startswith(f"{MODULE}.") for target in targets.values())
    )


def file_text(names: list[str]) -> str:
    """The two lines: the first needs hf_slim, the second gives the classes."""
    classes = ", ".join(names)
    return (
        f'import hf_slim  # pip install "{OLDEST_READER}"\n'
        f"from hf_slim.integration.formats.remote_code import {classes}  # noqa: F401\n"
    )


def auto_classes(model: nn.Module) -> list[str]:
    """Names of the Auto classes of transformers that load models of this class."""
    names = [name for name in dir(transformers) if name.startswith("AutoModel")]
    return [name for name in names if _loads(getattr(transformers, name), model)]


def _loads(auto_class: Any, model: nn.Module) -> bool:
    mapping = field_of(auto_class, "_model_mapping")
    found = mapping.get(type(config_of(model)), None) if mapping is not None else None
    classes = found if isinstance(found, tuple) else (found,)
    return type(model) in classes or auto_class is transformers.AutoModel


def __getattr__(name: str) -> type:
    if not name.startswith("AutoModel"):
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return _standing_for(getattr(transformers, name))


def _standing_for(auto_class: Any) -> type:
    """A class that transformers takes for a custom one, and that loads through its own Auto class."""

    class Loader:
        @classmethod
        def register_for_auto_class(cls, auto_class: Any = None) -> None:
            pass

        @classmethod
        def from_pretrained(cls, name: Any, *arguments: Any, **settings: Any) -> Any:
            settings["trust_remote_code"] = False
            return auto_class.from_pretrained(name, *arguments, **settings)

    return Loader
