"""Learned codebooks against k-means as it is written down, with every distance looked at, in float64."""

import pytest
import torch
from torch import Tensor

from hf_slim.quantization.grids import codebook as module
from hf_slim.quantization.grids.codebook import fitted_codebook


def values(rows: int = 6, columns: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def k_means(block: Tensor, entries: int, iterations: int) -> Tensor:
    """Lloyd 1982: every value to its nearest centre, every centre to the mean of its values; one without any stays."""
    found = block.double().flatten().sort().values
    centres = torch.stack([found[int((2 * entry + 1) * len(found) / (2 * entries))] for entry in range(entries)])
    for _ in range(iterations):
        nearest = (found.unsqueeze(1) - centres).abs().argmin(1)
        centres = torch.stack([
            found[nearest == entry].mean() if (nearest == entry).any() else centres[entry] for entry in range(entries)
        ])  # fmt: skip
    return centres


@pytest.mark.parametrize("iterations", [0, 1, 25])
@pytest.mark.parametrize(("books", "bits"), [(1, 3), (3, 2), (2, 4), (6, 1)])
def test_a_codebook_is_what_k_means_finds_in_its_rows(books, bits, iterations, monkeypatch):
    monkeypatch.setattr(module, "ITERATIONS", iterations)
    expected = torch.stack([k_means(block, 2**bits, iterations) for block in values().chunk(books)])
    found = fitted_codebook(values(), books, bits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("sample", "stride"), [(300, 1), (299, 2), (150, 2), (100, 3), (7, 43)])
def test_of_many_values_some_are_looked_at(sample, stride, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", sample)
    expected = k_means(values().flatten()[::stride], 4, 25)
    torch.testing.assert_close(fitted_codebook(values(), 1, 2)[0].double(), expected, rtol=1e-6, atol=1e-7)


def test_of_thousands_of_values_all_are_looked_at():
    block = values(5, 1000)
    torch.testing.assert_close(fitted_codebook(block, 1, 2)[0].double(), k_means(block, 4, 25), rtol=1e-6, atol=1e-7)


def test_few_distinct_values_are_all_in_the_codebook():
    """There is nothing for the other entries to stand for: they stay where they began."""
    block = torch.tensor([-0.5, 0.3125, 1.0]).repeat(2, 20)
    found = fitted_codebook(block, 1, 3)[0]
    assert set(found.tolist()) == {-0.5, 0.3125, 1.0}
    assert torch.equal(found, found.sort().values)


def test_a_fit_is_no_worse_than_its_start():
    def error(book: Tensor) -> Tensor:
        return (values().unsqueeze(-1) - book).square().amin(-1).sum()

    ordered = values().flatten().sort().values
    start = ordered[((torch.arange(8) + 0.5) / 8 * 300).long()]
    assert error(fitted_codebook(values(), 1, 3)[0]) < error(start)
