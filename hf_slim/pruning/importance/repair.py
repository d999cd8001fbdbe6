"""Least squares: the kept inputs of a layer compensate, as far as possible, for the removed ones."""

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.record import unwrapped
from hf_slim.core.running.calibration import RunBatches, first_that_fit
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.importance.statistics import Moments, summed_over_ranks_, watched
from hf_slim.pruning.matrices import Matrix, matrix_of
from hf_slim.pruning.removal.cut import Removed, kept_places

DAMPING = 0.01  # of the mean diagonal: few tokens must not decide about directions that they hardly show
PRODUCT_BYTES = 2**28  # how much the products of one pass may take; more layers need more passes over the batches


@torch.no_grad()
def repair_readers_(model: nn.Module, group_sets: list[GroupSet], removed: Removed, run_batches: RunBatches) -> None:
    """Changes the kept columns of every layer that reads removed groups, in place.

    Layers are repaired in the order of the forward pass; each pass over the batches sees the earlier ones repaired.

    Args:
        run_batches: Runs the calibration batches through the model, one for each item that it yields.
    Raises: SlimError: if no batch came.
    Source: the closed form of An et al. 2024, FLAP, arXiv:2312.11983, sec. 3.3 generalised from a bias to all columns:
        least squares as in Frantar and Alistarh 2022, arXiv:2208.11580, eq. 3.
    """
    inner = unwrapped(model)
    waiting = {path: gone for path, gone in _gone(inner, group_sets, removed).items() if len(gone)}
    while waiting:
        paths = first_that_fit({path: _product_bytes(inner.get_submodule(path)) for path in waiting}, PRODUCT_BYTES)
        with watched(inner, paths, ("total", "products")) as moments:
            batches = sum(1 for _ in run_batches())
        if not batches:
            raise SlimError("`repair` needs calibration batches, and none came. Check the data.")
        summed_over_ranks_(moments)
        for path in paths:
            gone = waiting.pop(path)
            if path in moments:  # a part of the model that the data never reaches is unchanged
                layer = inner.get_submodule(path)
                repair_(layer, gone.to(layer.weight.device), moments[path])


def repair_(layer: nn.Module, gone: Tensor, moments: Moments, damping: float = DAMPING) -> None:
    """W_K + W_R B with x_R ~ B x_K in the least squares sense; with a bias, x - mean in the place of x.

    Args:
        layer: `out x in`; its columns `gone` become zero.
        moments: With products.
    """
    matrix = matrix_of(layer)
    weight = layer.weight.detach() if matrix.in_dim == 1 else layer.weight.detach().t()
    kept = kept_places(weight.shape[1], gone).to(weight.device)
    products, mean = moments.products.double() / moments.tokens, moments.mean.double()
    if layer.bias is not None:
        products = products - torch.outer(mean, mean)
    inner = products[kept][:, kept]
    inner.diagonal().add_(damping * inner.diagonal().mean())
    taken_over = torch.linalg.solve(inner, products[kept][:, gone]).t()  # B: (gone, kept)
    columns = weight.double().clone()
    columns[:, kept] += columns[:, gone] @ taken_over
    if layer.bias is not None:
        layer.bias += (columns[:, gone] @ (mean[gone] - taken_over @ mean[kept])).to(layer.bias.dtype)
    columns[:, gone] = 0
    layer.weight.copy_((columns if matrix.in_dim == 1 else columns.t()).to(layer.weight.dtype))


def _gone(model: nn.Module, group_sets: list[GroupSet], removed: Removed) -> dict[str, Tensor]:
    """Linear layer -> the columns it loses, in the order of the sets."""
    gone: dict[str, list[Tensor]] = {}
    for group_set in group_sets:
        if group_set.masked_norms or group_set.is_depth:
            continue  # norms rescale what is kept, a tied head is also the embedding, and of a block nothing is kept
        for part in group_set.slices:
            if part.reads and _is_linear(matrix_of(model.get_submodule(part.module))):
                gone.setdefault(part.module, []).append(part.places(removed.get(group_set.name, [])).flatten())
    return {path: torch.cat(places).unique() for path, places in gone.items()}


def _is_linear(matrix: Matrix | None) -> bool:
    return matrix is not None and matrix.channels == -1


def _product_bytes(layer: nn.Module) -> int:
    """Of all products of two inputs of a layer, in float32."""
    return 4 * layer.weight.shape[matrix_of(layer).in_dim] ** 2
