"""Initial values of learned codebooks."""

import torch
from torch import Tensor

ITERATIONS = 25
SAMPLE = 2**18  # values that are used for the fit; more values change only the third digit


def fitted_codebook(values: Tensor, books: int, bits: int) -> Tensor:
    """Codebooks of 2**bits entries, fitted by k-means that starts from quantiles; entries are in ascending order.

    Args:
        values: `(rows, ...)`, float32; the rows are split into `books` consecutive blocks of equal size.
    Returns: `(books, 2**bits)`, float32.
    Source: Lloyd 1982, Least squares quantization in PCM. In one dimension the clusters are intervals of the sorted
        values, so that prefix sums give all the means at once.
    """
    return torch.stack([_fitted(block.flatten(), 2**bits) for block in values.float().chunk(books)])


def _fitted(values: Tensor, entries: int) -> Tensor:
    values = values[:: -(-len(values) // SAMPLE)].sort().values.double()
    sums = torch.cat((values.new_zeros(1), values.cumsum(0)))
    midpoints = (torch.arange(entries, device=values.device) + 0.5) / entries
    centres = values[(midpoints * len(values)).long()]
    for _ in range(ITERATIONS):
        ends = torch.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat((ends.new_zeros(1), ends, ends.new_full((1,), len(values))))
        counts = ends.diff()
        means = (sums[ends[1:]] - sums[ends[:-1]]) / counts.clamp_min(1)
        centres = torch.where(counts > 0, means, centres)  # an empty cluster keeps its centre
    return centres.float()
