"""A teacher shared out among the processes of a run, where the student is: FSDP2, and ZeRO stage 3 of DeepSpeed.

A teacher that every process held whole would take the memory that sharding the student has saved.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh


def share_out_(teacher: nn.Module, student: nn.Module, deepspeed: dict[str, Any] | None) -> Any:
    """Leaves each process its part of the teacher's weights, if the student's are shared out; otherwise nothing.

    Args:
        teacher: Frozen, the same in every process.
        student: As the Trainer has wrapped it.
        deepspeed: The run's configuration of DeepSpeed, with numbers in the place of "auto".
    Returns: what must live as long as the teacher answers; None if there is nothing of the kind.
    """
    if is_partitioned(student):
        return _partition_(teacher, deepspeed or {})
    if is_sharded(student):
        _shard_(teacher, next(p.device_mesh for p in student.parameters() if hasattr(p, "device_mesh")))
    return None


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds the weights."""
    if not distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO stage 3 holds the weights: a layer has them only while it runs."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Weights that ZeRO stage 3 has partitioned, whole in every process for a while."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def reshard_(model: nn.Module) -> None:
    """Gives back the weights that FSDP2 gathered for a forward pass and has kept."""
    if is_sharded(model):
        model.reshard()


def _shard_(teacher: nn.Module, mesh: DeviceMesh) -> None:
    """Layer by layer, as accelerate shards a student, so that no device holds the whole even while it is done.

    The rest, output layer included, stays gathered after a forward pass until `reshard_`: the layer runs afterwards,
    on as many chunks of rows as a process happens to have.
    """
    from torch.distributed.fsdp import fully_shard

    layers = getattr(teacher, "_no_split_modules", None) or ()
    for module in list(teacher.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(teacher, mesh=mesh, reshard_after_forward=False)


def _partition_(teacher: nn.Module, config: dict[str, Any]) -> Any:
    import deepspeed

    config = copy.deepcopy(config)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    return deepspeed.initialize(model=teacher, config=config)[0]
