"""Learned codebooks: where they start."""

import torch
from torch import Tensor

ITERATIONS = 25
SAMPLE = 2**18  # values that the search looks at; more changes the third digit


def fitted_codebook(values: Tensor, books: int, bits: int) -> Tensor:
    """The values that a grid of 2**bits entries should have, by k-means from quantiles, ascending.

    Args:
        values: `(rows, ...)`, float32; rows are dealt to the codebooks in order, in equal numbers.
    Returns: `(books, 2**bits)`, float32.
    Source: Lloyd 1982, Least squares quantization in PCM. In one dimension the clusters are intervals of the sorted
        values, so that prefix sums give all the means at once.
    """
    return torch.stack([_fitted(block.flatten(), 2**bits) for block in values.float().chunk(books)])


def _fitted(values: Tensor, entries: int) -> Tensor:
    values = values[:: -(-len(values) // SAMPLE)].sort().values.double()
    sums = torch.cat((values.new_zeros(1), values.cumsum(0)))
    middles = (torch.arange(entries, device=values.device) + 0.5) / entries
    centres = values[(middles * len(values)).long()]
    for _ in range(ITERATIONS):
        ends = torch.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat((ends.new_zeros(1), ends, ends.new_full((1,), len(values))))
        counts = ends.diff()
        means = (sums[ends[1:]] - sums[ends[:-1]]) / counts.clamp_min(1)
        centres = torch.where(counts > 0, means, centres)  # an empty cluster stays where it is
    return centres.float()
