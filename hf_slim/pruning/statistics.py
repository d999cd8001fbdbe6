"""What flows into the layers that read groups: means and squares per channel, and their products."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.layers import matrix_of


@dataclass
class Moments:
    """Sums over all tokens that a layer has read so far; float32, `(channels,)`.

    Attributes:
        products: `(channels, channels)`, the sum of x xT, where it was asked for.
    """

    tokens: float
    total: Tensor
    absolute: Tensor
    square: Tensor
    products: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        return self.total / self.tokens

    @property
    def mean_square(self) -> Tensor:
        return self.square / self.tokens

    @property
    def variance(self) -> Tensor:
        return self.mean_square - self.mean.square()


def readers(model: nn.Module, group_sets: Iterable[GroupSet]) -> list[str]:
    """Paths of the layers that read the groups.

    Raises: SlimError: if a set is read by something whose input cannot be seen, such as fused experts.
    """
    found = []
    for group_set in group_sets:
        paths = [part.module for part in group_set.slices if part.reads]
        for path in paths:
            if matrix_of(model.get_submodule(path)) is None:
                raise SlimError(
                    f"What flows into '{path}' cannot be seen from outside, so no criterion that looks at "
                    "activations, and no `repair`, works there. Choose criterion taylor, fisher, l1 or l2, or add it "
                    "to `ignore`."
                )
        found += paths
    return list(dict.fromkeys(found))


@contextmanager
def watched(
    model: nn.Module, paths: list[str], with_products: bool = False, only_in_training: bool = False
) -> Iterator[dict[str, Moments]]:
    """Adds up, while this lasts, what the layers at `paths` read: path -> moments, empty until a forward pass."""
    moments: dict[str, Moments] = {}
    adding = {path: _adding(path, moments, with_products, only_in_training) for path in paths}
    hooks = [model.get_submodule(path).register_forward_pre_hook(hook) for path, hook in adding.items()]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def summed_over_ranks_(moments: dict[str, Moments]) -> None:
    """Makes every process hold the sums over all of them, so that all choose alike."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    for found in moments.values():
        tokens = torch.tensor(found.tokens, device=found.total.device)
        for tensor in (tokens, found.total, found.absolute, found.square, found.products):
            if tensor is not None:
                torch.distributed.all_reduce(tensor)
        found.tokens = tokens.item()


def _adding(
    path: str, moments: dict[str, Moments], with_products: bool, only_in_training: bool
) -> Callable[[nn.Module, tuple], None]:
    @torch.no_grad()
    def add(layer: nn.Module, given: tuple) -> None:
        if only_in_training and not layer.training:
            return
        dim = given[0].dim() + matrix_of(layer).channels
        rows = given[0].detach().movedim(dim, -1).flatten(0, -2).float()
        new = Moments(len(rows), rows.sum(0), rows.abs().sum(0), rows.square().sum(0))
        new.products = rows.t() @ rows if with_products else None
        moments[path] = _added(moments[path], new) if path in moments else new

    return add


def _added(first: Moments, second: Moments) -> Moments:
    products = None if first.products is None else first.products.add_(second.products)
    sums = (first.total + second.total, first.absolute + second.absolute, first.square + second.square)
    return Moments(first.tokens + second.tokens, *sums, products)
