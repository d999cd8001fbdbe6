"""Sharding a teacher over the processes of a run like the student: FSDP2, and ZeRO stage 3 of DeepSpeed.

A full teacher in every process would take the memory that sharding the student saves.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh


def shard_teacher_(teacher: nn.Module, student: nn.Module, deepspeed: dict[str, Any] | None) -> Any:
    """Shard the teacher's weights over the processes if the student's are sharded; otherwise do nothing.

    Args:
        teacher: Frozen, with the same weights in every process.
        student: As the Trainer has wrapped it.
        deepspeed: The run's configuration of DeepSpeed, with "auto" replaced by numbers.
    Returns: DeepSpeed's engine, which must exist as long as the teacher is used; None without ZeRO stage 3.
    """
    if is_partitioned(student):
        return _shard_by_zero_(teacher, deepspeed or {})
    if is_sharded(student):
        from torch.distributed.tensor import DTensor

        _shard_by_fsdp_(teacher, next(p.device_mesh for p in student.parameters() if isinstance(p, DTensor)))
    return None


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model."""
    if not distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO stage 3 has partitioned the weights, which a layer then has only while it runs."""
    return any("ds_id" in vars(parameter) for parameter in model.parameters())


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which every process has the full weights that ZeRO stage 3 has partitioned."""
    partitioned = [parameter for parameter in parameters if "ds_id" in vars(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def reshard_(model: nn.Module) -> None:
    """Free the weights that FSDP2 has gathered for a forward pass and kept."""
    if is_sharded(model):
        model.reshard()


def _shard_by_fsdp_(teacher: nn.Module, mesh: DeviceMesh) -> None:
    """Shards layer by layer, as accelerate shards a student, so that no device ever has the full model.

    The other weights, those of the output layer included, are kept gathered after a forward pass until `reshard_`,
    because the output layer runs later, and the number of its chunks differs between processes.
    """
    from torch.distributed.fsdp import fully_shard

    layers = getattr(teacher, "_no_split_modules", None) or ()
    for module in list(teacher.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(teacher, mesh=mesh, reshard_after_forward=False)


def _shard_by_zero_(teacher: nn.Module, config: dict[str, Any]) -> Any:
    import deepspeed

    config = copy.deepcopy(config)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    return deepspeed.initialize(model=teacher, config=config)[0]
