"""Reductions over the processes of one training run, so that all of them make the same decisions.

Every function works in a single process too, where it changes nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Made = TypeVar("Made")


def is_distributed() -> bool:
    """Whether `torch.distributed` is initialised in this process."""
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks_(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by the sum over all processes, in place; all pass the same shapes in the same order."""
    if is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)


def range_over_ranks_(range_: Tensor) -> None:
    """Replaces a tensor `(2,)` of smallest and largest value by those over all processes, in place."""
    if is_distributed():
        ends = torch.stack((-range_[0], range_[1]))
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        range_[0], range_[1] = -ends[0], ends[1]


def made_by_first_rank(make: Callable[[], Made]) -> Made:
    """The result of `make` on the first process; the others get a copy and do not call it.

    Args:
        make: Returns JSON types, which are sent to the other processes.
    """
    if not is_distributed():
        return make()
    found: list[Any] = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]
