"""Which sizes a model's own config accepts: a uniform result is to be an ordinary checkpoint."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.errors import is_own_mistake
from hf_slim.core.modules import config_of, field_of
from hf_slim.pruning.groups import GroupSet

CONSTRAINED = ("kv_heads", "heads", "hidden", "experts")  # config classes take any number of neurons


def legal_ends(model: nn.Module, group_set: GroupSet, ends: Tensor) -> Tensor:
    """Those numbers of removed groups in `ends` after which the config's class accepts the kept number.

    All of them where the config has no field for that: the result is a slim folder with any number.
    """
    config = config_of(model)
    speaks_of_heads = field_of(config, "head_dim") is not None  # otherwise fewer heads would be wider ones
    if (
        group_set.kind not in CONSTRAINED
        or not group_set.config_fields
        or not (speaks_of_heads or group_set.kind == "experts")
    ):
        return ends
    values = {name: field_of(config, name) for name in group_set.config_fields}
    legal = [_accepts(config, values, group_set.count - gone, group_set.count) for gone in ends.tolist()]
    return ends[torch.tensor(legal, dtype=torch.bool)] if any(legal) else ends


def _accepts(config: Any, values: dict[str, int], left: int, count: int) -> bool:
    smaller = copy.copy(config).to_dict() | {name: value * left // count for name, value in values.items()}
    try:
        type(config).from_dict(smaller)
    except Exception as error:  # config classes raise what they like
        if is_own_mistake(error):
            raise
        return False
    return True
