"""GPTQ: rounds the columns of a weight in order, and corrects the columns that follow for the error of each one."""

import torch
from torch import Tensor

from hf_slim.quantization.grids.fake_quant import slice_dims
from hf_slim.quantization.grids.grid import Grid, GridState, snapped
from hf_slim.quantization.grids.observers import OBSERVERS

DAMPING = 0.01  # share of the mean of the Hessian's diagonal that is added to the diagonal
BLOCK = 128  # columns whose errors are applied together to the columns after them


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, observer: str) -> tuple[Tensor, GridState]:
    """Corrects a weight so that rounding it gives a small squared error of the layer's output.

    Args:
        weight: `(rows, columns)`, float32.
        hessian: `(columns, columns)`, sum over inputs x of x xᵀ.
        observer: Name of the observer that finds the scale of a group, from the weights corrected so far.
    Returns: the corrected weight, float32, before rounding, and the state to round it with, as `WeightQuantizer`
        stores it. The weight is not rounded, because a master that lies exactly on the grid needs many training steps
        to reach another grid value.
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
                # columns after this block are not corrected for it yet: correct them before the group is observed
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
    """The upper Cholesky factor of the inverse of the damped Hessian; an input that is always zero gets diagonal 1."""
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
