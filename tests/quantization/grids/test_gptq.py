"""GPTQ against the formulas of its paper, which invert the Hessian of the remaining columns anew for every column."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hf_slim import Grid
from hf_slim.quantization.grids import gptq as module
from hf_slim.quantization.grids.gptq import gptq

GRIDS = {
    "channel": Grid(bits=3),
    "groups": Grid(bits=5, granularity="group", group_size=6),
    "one tensor": Grid(bits=4, granularity="tensor"),
    "zero points": Grid(bits=4, symmetric=False),
    "groups with zero points": Grid(bits=5, symmetric=False, granularity="group", group_size=10),
    "unsigned": Grid(bits=4, symmetric=False, signed=False),
}


def layer(
    rows: int = 5, columns: int = 26, seed: int = 0, unseen: Sequence[int] = (), size: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A weight, and inputs of a size that correlate; those of the columns `unseen` are zero."""
    generator = torch.Generator().manual_seed(seed)
    weight, inputs, mixing = (
        torch.randn(*shape, generator=generator) for shape in ((rows, columns), (300, columns), (columns, columns))
    )
    inputs = size * inputs @ mixing
    inputs[:, list(unseen)] = 0
    return weight, inputs


def scale_and_zero_point(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Jacob et al. 2018: the width of a step and the code of zero, for each row."""
    steps, low_code = 2**grid.bits - 1, -(2 ** (grid.bits - 1)) if grid.signed else 0
    values = values.flatten().unsqueeze(0) if grid.granularity == "tensor" else values
    if grid.symmetric:
        return values.abs().amax(1) * 2 / steps, torch.zeros(len(values), dtype=torch.float64)
    low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
    return (high - low) / steps, low_code - (low / ((high - low) / steps)).round()


def reference(weight: Tensor, hessian: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor, float]:
    """Frantar et al. 2023, eq. 2 and 3, one column after the other, in float64.

    Returns: the corrected weight, scales, zero points, and how far from half-way between two codes every value is.
    """
    weight, hessian = weight.double(), hessian.double()
    unseen = hessian.diagonal() == 0
    hessian = hessian + torch.diag(unseen.double())
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    low = -(2 ** (grid.bits - 1)) if grid.signed else 0
    high, columns = low + 2**grid.bits - 1, weight.shape[1]
    found, group_size, margin = [], grid.group_size or columns, 0.5
    corrected = weight.clone()
    for column in range(columns):
        if column % group_size == 0:
            found.append(scale_and_zero_point(corrected[:, column : column + group_size], grid))
        scale, zero_point = found[-1]
        values = corrected[:, column]
        place = values / scale + zero_point
        below, code = (place.clamp(low, high) for place in (place.floor(), place.round()))
        far = torch.where(below < high, (place - place.floor() - 0.5).abs(), 0.5)
        margin = min(margin, float(far.min()))
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = (values - (code - zero_point) * scale) / inverse[0, 0]
        corrected[:, column + 1 :] -= torch.outer(error, inverse[0, 1:])
    return corrected, *(torch.stack(parts, 1).unsqueeze(-1) for parts in zip(*found, strict=True)), margin


def layer_without_ties(grid: Grid, **changes) -> tuple[Tensor, Tensor]:
    """A weight and inputs for which float32 and float64 round every value to the same code."""
    drawn = (layer(seed=seed, **changes) for seed in range(500))
    return next((w, x) for w, x in drawn if reference(w, x.t() @ x, grid)[-1] > 1e-3)


@pytest.mark.parametrize("block", [1, 4, 9, 128])
@pytest.mark.parametrize("name", GRIDS)
def test_every_column_makes_good_the_errors_of_those_before_it(name, block, monkeypatch):
    """Blocks only put corrections off; groups may begin and end anywhere within them."""
    monkeypatch.setattr(module, "BLOCK", block)
    weight, inputs = layer_without_ties(GRIDS[name])
    hessian = inputs.t() @ inputs
    found, state = gptq(weight, hessian, GRIDS[name], "minmax")
    expected, scale, zero_point, _ = reference(weight, hessian, GRIDS[name])
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state.scale.double(), scale, rtol=1e-4, atol=1e-7)
    assert (state.zero_point is None) == GRIDS[name].symmetric
    if state.zero_point is not None:
        assert torch.equal(state.zero_point.double(), zero_point)


@pytest.mark.parametrize("unseen", [[3], [0, 7, 25], range(0, 26, 2)], ids=["one", "three", "half"])
@pytest.mark.parametrize("size", [1.0, 0.02])
def test_inputs_that_are_always_zero_leave_the_others_alone(unseen, size):
    """They count as if they had the square 1 in the mean that damps the others, as in the authors' code."""
    weight, inputs = layer_without_ties(GRIDS["channel"], unseen=unseen, size=size)
    hessian = inputs.t() @ inputs
    found, _ = gptq(weight, hessian, GRIDS["channel"], "minmax")
    torch.testing.assert_close(found.double(), reference(weight, hessian, GRIDS["channel"])[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(found[:, list(unseen)], weight[:, list(unseen)])  # nobody's error is made good there


def test_a_layer_that_sees_nothing_keeps_its_weight():
    weight, _ = layer()
    assert torch.equal(gptq(weight, torch.zeros(26, 26), GRIDS["channel"], "minmax")[0], weight)


def test_inputs_that_do_not_correlate_leave_every_weight_alone():
    weight, _ = layer()
    found, state = gptq(weight, 7 * torch.eye(26), GRIDS["groups"], "minmax")
    assert torch.equal(found, weight)
    assert state.scale.shape == (5, 5, 1)  # four groups of six columns and one of two


@pytest.mark.parametrize("groups", [{}, {"granularity": "group", "group_size": 6}])
def test_a_given_scale_is_that_of_all_groups(groups):
    weight, inputs = layer()
    _, state = gptq(weight, inputs.t() @ inputs, Grid(bits=4, scale=0.25, **groups), "minmax")
    assert state.scale == 0.25


def test_what_was_given_stays_as_it_was():
    weight, inputs = layer()
    inputs[:, 3] = 0
    hessian = inputs.t() @ inputs
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, GRIDS["groups"], "mse")
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
