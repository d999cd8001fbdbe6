"""Shapes of tensors in floating point, and changes of a tensor's shape before it is loaded."""

import torch
from torch import nn

from hf_slim.core.adapters import adapter_parts, without_adapters
from hf_slim.core.contracts import PackedLayer
from hf_slim.core.errors import SlimLoadError
from hf_slim.core.files.json_file import AGAIN, shown
from hf_slim.core.host import config_of, field_of, is_transposed_linear, parameter_or_none
from hf_slim.core.modules import resolve, set_count_
from hf_slim.pruning.matrices import set_sizes_


def logical_shapes(model: nn.Module, skeleton: nn.Module | None = None) -> dict[str, list[int]]:
    """`{path: shape}` of every parameter and running statistic; of packed weights, the shape before packing.

    Args:
        skeleton: The same model in floating point. It tells which layers store their weights transposed (GPT-2's
            Conv1D), because a packed linear layer does not.
    """
    shapes, adapters = {}, adapter_parts(model)
    for path, module in model.named_modules():
        tensors = dict(module.named_parameters(recurse=False)) | {
            name: buffer for name, buffer in module.named_buffers(recurse=False) if name.startswith("running_")
        }
        if "_quantizer" in path or path in adapters:
            continue
        for name, tensor in tensors.items():
            shape = list(tensor.shape)
            if isinstance(module, PackedLayer) and tensor.dtype == torch.int8:
                shape = list(module.float_shape(name))
                if skeleton is not None and is_transposed_linear(skeleton.get_submodule(path)):
                    shape.reverse()
            shapes[without_adapters(f"{path}.{name}".lstrip("."))] = shape
    return shapes


def resize_(model: nn.Module, path: str, shape: list[int]) -> None:
    """Gives the tensor at `path` another shape, with undefined values; a path that the model lacks is ignored.

    Folders of formats 1 and 2 have the path of a linear layer instead, and its weight's shape.

    Raises: SlimLoadError: for a path to anything but a tensor with as many dimensions.
    """
    parent, _, name = path.rpartition(".")
    found = resolve(model, path)
    if found is not None:
        layer = model.get_submodule(found)
        _set_(layer, "weight", shape, path)
        if parameter_or_none(layer, "bias") is not None:
            _set_(layer, "bias", shape[:1], path)
    elif (found := resolve(model, parent)) is not None:
        _set_(model.get_submodule(found), name, shape, path)


def set_attribute_(model: nn.Module, path: str, attribute: str, value: int | float) -> None:
    """Sets an attribute with a size of the module at `path`, if this model has the module.

    Raises: SlimLoadError: for an attribute that is not a number.
    """
    found = resolve(model, path)
    if found is None:
        return
    module = model.get_submodule(found)
    name = attribute.removeprefix("config.")
    holder = module if name == attribute else config_of(module)
    if holder is None or not name.isidentifier() or name.startswith("_") or not _is_number(field_of(holder, name, 0)):
        raise SlimLoadError(
            f"`quantization_config.attributes` in config.json names {shown(attribute)} of {shown(path)}, which is no "
            f"number of that module. The folder is damaged, or was changed by hand. {AGAIN}"
        )
    set_count_(module, attribute, value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _set_(module: nn.Module, name: str, shape: list[int], path: str) -> None:
    old = parameter_or_none(module, name)
    if not isinstance(old, torch.Tensor) or old.dim() != len(shape):
        raise SlimLoadError(
            f"`quantization_config.shapes` in config.json gives {shown(path)} the shape {shown(shape)}, and the model "
            f"has {'no such tensor' if not isinstance(old, torch.Tensor) else list(old.shape)}. The folder is "
            f"damaged, or was changed by hand. {AGAIN}"
        )
    new = torch.empty(shape, device=old.device, dtype=old.dtype)
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    set_sizes_(module)
