"""The tensors of a packed model as a file of another format has them, and what reading such a file needs."""

from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter

from hf_slim.core.adapters import adapter_layers
from hf_slim.core.contracts import PackedLayer
from hf_slim.core.errors import SlimError
from hf_slim.integration.formats import choice  # noqa: F401  registers all formats
from hf_slim.integration.formats.codes import Layer
from hf_slim.integration.formats.format import FORMATS
from hf_slim.integration.hf_quantizer import SLIM, HfSlimConfig


def file_tensors(model: nn.Module, config: HfSlimConfig) -> dict[str, Tensor] | None:
    """Every tensor that a file of the model's format holds, by name; None: those of the model itself.

    Raises: SlimError: if weights are offloaded, so that there are no codes to convert.
    """
    if adapter_layers(model):
        return None  # only the adapters are written
    found: Any = model
    save_format, dtype = FORMATS[config.save_format], found.dtype
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            layer: Layer = module
            _require_memory(name, layer)
            for own in layer.state_dict():
                if own != "bias":
                    del tensors[f"{name}.{own}"]
            tensors |= {f"{name}.{key}": tensor for key, tensor in save_format.tensors(layer, dtype).items()}
    return {
        name: tensor.clone() if name in config.tied and name in tensors else tensor
        for name, tensor in tensors.items()
    }  # fmt: skip


def expected_tensors(model: nn.Module, config: HfSlimConfig) -> dict[str, Tensor]:
    """What a folder in another format must hold of packed layers: name -> tensor, on the meta device as they are.

    Weights that are tied to others may be absent from a folder, and are left out here.
    """
    found: Any = model
    if config.save_format == SLIM:
        return {}
    save_format, tied = FORMATS[config.save_format], {*found.all_tied_weights_keys, *config.tied}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}
    return {
        f"{name}.{key}": tensor
        for name, layer in layers.items() if f"{name}.weight" not in tied
        for key, tensor in save_format.tensors(layer, found.dtype).items()
        if "quant_state" not in key  # a text of bitsandbytes, whose length depends on the name of a dtype
    }  # fmt: skip


def conversions_of(config: HfSlimConfig) -> list[WeightConverter]:
    """How the tensors of a folder become those of packed layers; none for a slim one."""
    return [] if config.save_format == SLIM else FORMATS[config.save_format].conversions()


def ignore_leftovers_(model: Any, config: HfSlimConfig) -> None:
    """Lets the loader say nothing about tensors that packed layers have no use for."""
    patterns = FORMATS[config.save_format].ignored
    if patterns:
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *patterns}


def untie_(model: Any) -> dict[str, str]:
    """Has config.json say that no weights are tied, for formats that store them twice. Weights stay shared.

    Returns: what is tied: later name -> first name.
    """
    tied = dict(model.all_tied_weights_keys)
    _set_tied_(model, False)
    return tied


def tie_(model: Any, tied: dict[str, str]) -> None:
    """Lets a model share the weights that its folder stores twice.

    Args:
        tied: Later name -> first name.
    """
    for later, first in tied.items():
        owner, _, name = later.rpartition(".")
        held = dict(model.named_parameters(remove_duplicate=False))
        if {later, first} <= held.keys() and held[later].device == held[first].device:
            setattr(model.get_submodule(owner), name, held[first])
            share_scales_(model, later, first)


def tie_on_disk_(model: Any, tied: dict[str, str]) -> None:
    """The inverse of `untie_`: config.json says again what is tied, and shared tensors are stored once."""
    _set_tied_(model, True)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    for later, first in tied.items():
        share_scales_(model, later, first)


def share_scales_(model: nn.Module, later: str, first: str) -> None:
    """Lets a packed layer whose weight is tied to another's use its scales too, which are stored once."""
    head, owner = (model.get_submodule(path.rpartition(".")[0]) for path in (later, first))
    for buffer in ("weight_scale", "weight_zero_point"):
        if later.endswith(".weight") and hasattr(head, buffer) and hasattr(owner, buffer):
            head.register_buffer(buffer, getattr(owner, buffer), persistent=False)


def _set_tied_(model: Any, tied: bool) -> None:
    for config in {id(one): one for one in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = tied


def _require_memory(name: str, layer: Layer) -> None:
    if any(tensor.is_meta for tensor in layer.state_dict().values()):
        raise SlimError(
            f"The weights of '{name}' are offloaded, so they cannot be written in another layout. Load the model "
            "without `device_map`, or copy its folder."
        )
