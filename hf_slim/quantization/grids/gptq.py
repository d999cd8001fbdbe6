"""GPTQ: starting weights rounded so that each error is made good by the weights that are still to be rounded."""

import torch
from torch import Tensor

from hf_slim.quantization.grids.fake_quant import slice_dims
from hf_slim.quantization.grids.grid import Grid, GridState, snapped
from hf_slim.quantization.grids.observers import OBSERVERS

DAMPING = 0.01  # of the mean diagonal, added to it
BLOCK = 128  # columns whose corrections are applied to the rest at once


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, observer: str) -> tuple[Tensor, GridState]:
    """The weight on its grid with the least squared error of the layer's output, column by column.

    Args:
        weight: `(rows, columns)`, float32.
        hessian: `(columns, columns)`, sum over inputs x of x xᵀ.
        observer: How the scale of a group is found, from the corrected weights when its turn comes.
    Returns: the corrected weight, float32, just before each value was rounded, and the state to round it with, as
        `WeightQuantizer` stores it. Masters that lie on the grid already would need many steps to leave their values.
    Source: Frantar et al. 2023, GPTQ, arXiv:2210.17323, algorithm 1.
    """
    weight, inverse = weight.clone(), _inverse_factor(hessian)
    columns = weight.shape[1]
    group_size = grid.group_size or columns
    corrected, states = torch.empty_like(weight), []
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.zeros(len(weight), end - start, device=weight.device)
        for column in range(start, end):
            if column % group_size == 0:
                # columns beyond this block lack its corrections yet: apply them before looking at the group
                ahead = weight[:, column : column + group_size].clone()
                if column + group_size > end and column > start:
                    ahead[:, end - column :] -= errors @ inverse[start:end, end : column + group_size]
                states.append(OBSERVERS[observer](ahead.unsqueeze(1), grid, slice_dims(grid)))
            values = weight[:, column].clone()
            corrected[:, column] = values
            rounded = snapped(values.view(-1, 1, 1), grid, states[-1]).view(-1)
            error = (values - rounded) / inverse[column, column]
            weight[:, column:end] -= torch.outer(error, inverse[column, column:end])
            errors[:, column - start] = error
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return corrected, _joined(states)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian; inputs that never came count as alone."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def _joined(states: list[GridState]) -> GridState:
    def join(values: list[Tensor | None]) -> Tensor | None:
        return None if values[0] is None else torch.cat(values, dim=1) if values[0].dim() == 3 else values[0]

    scale, zero_point = join([s.scale for s in states]), join([s.zero_point for s in states])
    return GridState(scale, zero_point, states[0].codebook)
