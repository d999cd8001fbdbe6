"""Repair by least squares: the weights of kept inputs of a layer are corrected for the removed inputs."""

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.record import unwrapped
from hf_slim.core.running.calibration import RunBatches, first_that_fit
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.importance.statistics import Moments, summed_over_ranks_, watched
from hf_slim.pruning.matrices import Matrix, matrix_of
from hf_slim.pruning.removal.cut import Removed, kept_places

DAMPING = 0.01  # share of the mean diagonal that is added, for directions that occur rarely in the data
PRODUCT_BYTES = 2**28  # memory for the products of one pass; more layers need more passes over the batches


@torch.no_grad()
def repair_readers_(model: nn.Module, group_sets: list[GroupSet], removed: Removed, run_batches: RunBatches) -> None:
    """Changes the kept columns of every layer that reads removed groups, in place.

    Layers are repaired in the order of the forward pass; each pass over the batches uses the layers repaired before.

    Args:
        run_batches: Runs the calibration batches through the model, one for each item that it yields.
    Raises: SlimError: if there are no batches.
    Source: the closed form of An et al. 2024, FLAP, arXiv:2312.11983, sec. 3.3, generalised from a bias to all
        columns: least squares as in Frantar and Alistarh 2022, arXiv:2208.11580, eq. 3.
    """
    inner = unwrapped(model)
    remaining = {path: at for path, at in _removed_columns(inner, group_sets, removed).items() if len(at)}
    while remaining:
        paths = first_that_fit({path: _product_bytes(inner.get_submodule(path)) for path in remaining}, PRODUCT_BYTES)
        with watched(inner, paths, ("total", "products")) as moments:
            batches = sum(1 for _ in run_batches())
        if not batches:
            raise SlimError("`repair` needs calibration batches, and there are none. Check the data.")
        summed_over_ranks_(moments)
        for path in paths:
            columns = remaining.pop(path)
            if path in moments:  # layers that did not run on the batches are not changed
                layer = inner.get_submodule(path)
                repair_(layer, columns.to(layer.weight.device), moments[path])


def repair_(layer: nn.Module, removed: Tensor, moments: Moments, damping: float = DAMPING) -> None:
    """Corrects kept columns (K) for removed ones (R): W_K + W_R B, where B x_K is the best approximation of x_R.

    For a layer with a bias, x - mean is used instead of x.

    Args:
        layer: A linear layer.
        removed: Indices of the removed columns, which become zero.
        moments: Statistics of the layer's input, with `products`.
    """
    matrix = matrix_of(layer)
    weight = layer.weight.detach() if matrix.in_dim == 1 else layer.weight.detach().t()
    kept = kept_places(weight.shape[1], removed).to(weight.device)
    products, mean = moments.products.double() / moments.tokens, moments.mean.double()
    if layer.bias is not None:
        products = products - torch.outer(mean, mean)
    inner = products[kept][:, kept]
    inner.diagonal().add_(damping * inner.diagonal().mean())
    taken_over = torch.linalg.solve(inner, products[kept][:, removed]).t()  # B: (removed, kept)
    columns = weight.double().clone()
    columns[:, kept] += columns[:, removed] @ taken_over
    if layer.bias is not None:
        layer.bias += (columns[:, removed] @ (mean[removed] - taken_over @ mean[kept])).to(layer.bias.dtype)
    columns[:, removed] = 0
    layer.weight.copy_((columns if matrix.in_dim == 1 else columns.t()).to(layer.weight.dtype))


def _removed_columns(model: nn.Module, group_sets: list[GroupSet], removed: Removed) -> dict[str, Tensor]:
    """Path of a linear layer -> indices of its removed columns, in the order of the sets."""
    found: dict[str, list[Tensor]] = {}
    for group_set in group_sets:
        if group_set.masked_norms or group_set.is_depth:
            continue  # norms rescale kept channels, a tied head is also the embedding, and blocks keep no columns
        for part in group_set.slices:
            if part.reads and _is_linear(matrix_of(model.get_submodule(part.module))):
                found.setdefault(part.module, []).append(part.places(removed.get(group_set.name, [])).flatten())
    return {path: torch.cat(places).unique() for path, places in found.items()}


def _is_linear(matrix: Matrix | None) -> bool:
    return matrix is not None and matrix.channels == -1


def _product_bytes(layer: nn.Module) -> int:
    """Bytes of all products of two inputs of a layer, in float32."""
    return 4 * layer.weight.shape[matrix_of(layer).in_dim] ** 2
