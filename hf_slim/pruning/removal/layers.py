"""Removes whole layers from a stack, and updates the modules and configs that count them."""

import re
from typing import Any

from torch import nn

from hf_slim.core.host import config_of
from hf_slim.pruning.groups import GroupSet

LAYER_COUNT = re.compile(r"(num|n)_.*layers?$|(en|de)coder_layers$")  # config fields with the number of layers


def remove_layers_(model: nn.Module, group_set: GroupSet, removed: list[int]) -> None:
    """Removes layers from their stack and updates the modules and configs that count them."""
    stack = model.get_submodule(group_set.stack)
    kept = [index for index in range(len(stack)) if index not in removed]
    for new, old in enumerate(kept):
        for module in stack[old].modules():
            if vars(module).get("layer_idx") == old:  # its index in the cache
                module.layer_idx = new
    parent, _, name = group_set.stack.rpartition(".")
    owner = model.get_submodule(parent)
    smaller = nn.ModuleList(stack[index] for index in kept)
    smaller.training = stack.training
    setattr(owner, name, smaller)
    for attribute, value in list(vars(owner).items()):
        if LAYER_COUNT.match(attribute) and value == group_set.count:
            setattr(owner, attribute, len(kept))
    for config in _configs(model):
        _shrink_config_(config, group_set, kept)


def renamed(path: str, group_set: GroupSet, removed: list[int]) -> str | None:
    """The name of a module after layers are removed; None if it was removed with them."""
    head = f"{group_set.stack}."
    if not path.startswith(head):
        return path
    index, _, rest = path.removeprefix(head).partition(".")
    if int(index) in removed:
        return None
    return f"{head}{int(index) - sum(earlier < int(index) for earlier in removed)}.{rest}".rstrip(".")


def _configs(model: nn.Module) -> list[Any]:
    """Every config object in the model, once."""
    found = {id(config): config for module in model.modules() if (config := config_of(module)) is not None}
    return list(found.values())


def _shrink_config_(config: Any, group_set: GroupSet, kept: list[int]) -> None:
    in_decoder = "decoder" in group_set.stack
    counters = [name for name, value in vars(config).items() if LAYER_COUNT.match(name) and value == group_set.count]
    named = [name for name in counters if ("decoder" in name) == in_decoder]
    for name in named or counters:
        setattr(config, name, len(kept))
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == group_set.count and name.endswith(("layer_types", "_layers")):
            setattr(config, name, [value[index] for index in kept])
