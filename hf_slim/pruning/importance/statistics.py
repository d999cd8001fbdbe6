"""Statistics of forward passes: inputs of the layers that read groups, and angles between inputs and outputs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import pi

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.modules import temporary_hooks
from hf_slim.core.running.distributed import is_distributed, sum_over_ranks_
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.matrices import matrix_of

PIECE = 2**20  # numbers that are turned into float32 at a time
SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "total": lambda rows: rows.sum(0),
    "absolute": lambda rows: rows.abs().sum(0),
    "square": lambda rows: rows.square().sum(0),
    "products": lambda rows: rows.t() @ rows,
}
Predicate = Callable[[nn.Module], bool]


@dataclass
class Moments:
    """Sums over all tokens that a layer has read so far, float32; None for sums that the criterion does not need.

    Attributes:
        total: Sum of x, `(channels,)`.
        absolute: Sum of |x|, `(channels,)`.
        square: Sum of x**2, `(channels,)`.
        products: Sum of x xT, `(channels, channels)`.
    """

    tokens: float = 0.0
    total: Tensor | None = None
    absolute: Tensor | None = None
    square: Tensor | None = None
    products: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Mean of every channel over the tokens: `(channels,)`."""
        return self.total / self.tokens

    @property
    def variance(self) -> Tensor:
        """Variance of every channel over the tokens: `(channels,)`."""
        return self.square / self.tokens - self.mean.square()


@dataclass
class AngularDistance:
    """Sum over tokens of the angle between the input and the output of a layer, as a share of 180 degrees."""

    tokens: float = 0.0
    angle: Tensor | None = None


def readers(model: nn.Module, group_sets: Iterable[GroupSet]) -> list[str]:
    """Paths of the layers that read the groups.

    Raises: SlimError: if a module reads a set and its activations cannot be recorded, as in fused experts.
    """
    found = []
    for group_set in group_sets:
        paths = [part.module for part in group_set.slices if part.reads]
        for path in paths:
            if matrix_of(model.get_submodule(path)) is None:
                raise SlimError(
                    f"Activations of '{path}' cannot be recorded, because its weights are fused. Criteria based on "
                    "activations and `repair` do not support it. Choose criterion taylor, fisher, l1 or l2, or add it "
                    "to `ignore`."
                )
        found += paths
    return list(dict.fromkeys(found))


def always(layer: nn.Module) -> bool:
    """The predicate that records every forward pass."""
    return True


@contextmanager
def watched(
    model: nn.Module, paths: list[str], sums: tuple[str, ...], when: Predicate = always
) -> Iterator[dict[str, Moments]]:
    """Context that records the inputs of the layers at `paths`: path -> moments; empty until a forward pass.

    Args:
        sums: Names in `SUMS` of the sums to record.
        when: Predicate of a layer: whether its forward pass is recorded.
    """
    moments: dict[str, Moments] = {}

    def adding(path: str) -> Callable[[nn.Module, tuple], None]:
        @torch.no_grad()
        def add(layer: nn.Module, given: tuple) -> None:
            if when(layer):
                rows = given[0].detach().movedim(given[0].dim() + matrix_of(layer).channels, -1).flatten(0, -2)
                with torch.autocast(rows.device.type, enabled=False):  # the run's half precision ruins the products
                    _add_(moments.setdefault(path, Moments()), rows, sums)

        return add

    with temporary_hooks(model.get_submodule(path).register_forward_pre_hook(adding(path)) for path in paths):
        yield moments


@contextmanager
def watched_layers(
    model: nn.Module, paths: list[str], when: Predicate = always
) -> Iterator[dict[str, AngularDistance]]:
    """Context that records the angles between input and output of the layers at `paths`."""
    found: dict[str, AngularDistance] = {}

    def adding(path: str) -> Callable[[nn.Module, tuple, dict, object], None]:
        @torch.no_grad()
        def add(layer: nn.Module, given: tuple, named: dict, made: object) -> None:
            if when(layer):
                before = next(value for value in (*given, *named.values()) if isinstance(value, Tensor))
                after = made if isinstance(made, Tensor) else made[0]
                cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1).clamp_(-1, 1)
                distance = found.setdefault(path, AngularDistance())
                distance.tokens += cosine.numel()
                so_far = 0 if distance.angle is None else distance.angle
                distance.angle = so_far + cosine.acos().sum() / pi

        return add

    handles = (model.get_submodule(path).register_forward_hook(adding(path), with_kwargs=True) for path in paths)
    with temporary_hooks(handles):
        yield found


def summed_over_ranks_(found: dict[str, Moments] | dict[str, AngularDistance]) -> None:
    """Replaces the sums of every process by those over all processes, so that all make the same choice."""
    if not is_distributed():
        return
    for seen in found.values():
        sums = [vars(seen)[field.name] for field in fields(seen) if field.name != "tokens"]
        sums = [tensor for tensor in sums if tensor is not None]
        tokens = torch.tensor(seen.tokens, device=sums[0].device)
        sum_over_ranks_((tokens, *sums))
        seen.tokens = tokens.item()


def _add_(moments: Moments, rows: Tensor, sums: tuple[str, ...]) -> None:
    for piece in rows.split(max(1, PIECE // rows.shape[1])):
        piece = piece.float()
        for name in sums:
            new, old = SUMS[name](piece), vars(moments)[name]
            setattr(moments, name, new if old is None else old.add_(new))
    moments.tokens += len(rows)
