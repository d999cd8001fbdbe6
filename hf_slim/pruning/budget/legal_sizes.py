"""The sizes that a model's config accepts, so that a uniform result is an ordinary checkpoint."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.errors import is_own_mistake
from hf_slim.core.host import config_of, field_of
from hf_slim.pruning.groups import GroupSet

CONSTRAINED = ("kv_heads", "heads", "hidden", "experts")  # config classes take any number of neurons


def legal_ends(model: nn.Module, group_set: GroupSet, ends: Tensor) -> Tensor:
    """The numbers of removed groups in `ends` for which the config class accepts the number of kept groups.

    All of them if the config has no field for it; then loading the result needs hf_slim.
    """
    config = config_of(model)
    has_head_width = field_of(config, "head_dim") is not None  # otherwise fewer heads would be wider
    if (
        group_set.kind not in CONSTRAINED
        or not group_set.config_fields
        or not (has_head_width or group_set.kind == "experts")
    ):
        return ends
    values = {name: field_of(config, name) for name in group_set.config_fields}
    legal = [_accepts(config, values, group_set.count - removed, group_set.count) for removed in ends.tolist()]
    return ends[torch.tensor(legal, dtype=torch.bool)] if any(legal) else ends


def _accepts(config: Any, values: dict[str, int], left: int, count: int) -> bool:
    smaller = copy.copy(config).to_dict() | {name: value * left // count for name, value in values.items()}
    try:
        type(config).from_dict(smaller)
    except Exception as error:  # config classes may raise any error
        if is_own_mistake(error):
            raise
        return False
    return True
