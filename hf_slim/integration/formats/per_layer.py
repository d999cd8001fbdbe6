"""Sizes that differ from layer to layer, as the config of transformers says them: `per_layer_config`.

hf_slim rebuilds such a model from its own list of shapes. The mirror is for others that read sizes from the config: a
static cache in `generate` makes room for the right number of heads.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from hf_slim.core.errors import is_own_mistake
from hf_slim.core.host import config_of, field_of
from hf_slim.integration.shapes import logical_shapes

FIELDS = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
Build = Callable[[Any], nn.Module]  # a config -> the model that it describes, on the meta device
Units = dict[tuple[str, int], int]  # (tensor, dimension) -> how much it grows with one more of a field


def mirror_sizes_(model: nn.Module, build: Build) -> None:
    """Writes the sizes of every layer into the model's config, if a few numbers a layer explain all its shapes."""
    config: Any = config_of(model)
    skeleton = build(config)
    path = _stack(skeleton, field_of(config, "num_hidden_layers"))
    if path is None or field_of(config, "per_layer_config") is None or config.get_text_config() is not config:
        return
    expected, found = logical_shapes(skeleton), logical_shapes(model, skeleton)
    differing = [(tensor, dim) for tensor, shape in found.items() for dim in _differing(shape, expected.get(tensor))]
    sizes: dict[int, dict[str, int]] = {}
    units = {name: _units(config, name, build, expected) for name in FIELDS} if differing else {}
    for tensor, dim in differing:
        index = tensor.removeprefix(f"{path}.").partition(".")[0]
        grown = found[tensor][dim] - expected[tensor][dim]
        owners = [name for name, owned in units.items() if (tensor, dim) in owned]
        if not tensor.startswith(f"{path}.") or len(owners) != 1 or grown % units[owners[0]][tensor, dim]:
            return
        size = field_of(config, owners[0]) + grown // units[owners[0]][tensor, dim]
        if sizes.setdefault(int(index), {}).setdefault(owners[0], size) != size:
            return
    if sizes:
        _set_(config, sizes)


def forget_mirror_(model: nn.Module) -> None:
    """Takes the sizes out of the config again, before its layers change."""
    config: Any = config_of(model)
    if field_of(config, "is_heterogeneous", False) and field_of(config, "quantization_config") is not None:
        config.per_layer_config = None
        vars(config).pop("allow_global_per_layer_attribute_access", None)


def _set_(config: Any, sizes: dict[int, dict[str, int]]) -> None:
    config.allow_global_per_layer_attribute_access = True  # Llama and others still read one size for all layers
    config.per_layer_config = sizes
    try:
        type(config).from_dict(config.to_dict())  # some classes refuse numbers of heads, and only when they are read
    except Exception as error:
        if is_own_mistake(error):
            raise
        config.per_layer_config = None
        vars(config).pop("allow_global_per_layer_attribute_access")


def _units(config: Any, name: str, build: Build, expected: dict[str, list[int]]) -> Units:
    """The dimensions of tensors that follow a field of the config; none if the model has no such field."""
    usual = field_of(config, name)
    if not isinstance(usual, int):
        return {}
    other = copy.deepcopy(config)
    step = usual if name != "num_key_value_heads" or usual == 1 else 1 - usual  # heads stay a multiple of them
    setattr(other, name, usual + step)
    try:
        shapes = logical_shapes(build(other))
    except Exception as error:  # a config class refuses sizes that it finds illegal
        if is_own_mistake(error):
            raise
        return {}
    return {
        (tensor, dim): (shape[dim] - expected[tensor][dim]) // step
        for tensor, shape in shapes.items() for dim in _differing(shape, expected.get(tensor))
    }  # fmt: skip


def _differing(shape: list[int], other: list[int] | None) -> list[int]:
    if other is None or len(shape) != len(other):
        return []
    return [dim for dim, (here, there) in enumerate(zip(shape, other, strict=True)) if here != there]


def _stack(skeleton: nn.Module, count: int | None) -> str | None:
    """The path of the layers, if the model has one list of that many."""
    lists = [
        name for name, module in skeleton.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return lists[0] if len(lists) == 1 else None
