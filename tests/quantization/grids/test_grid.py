import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_slim import Grid, SlimError
from hf_slim.quantization.grids.codebook import fitted_codebook
from hf_slim.quantization.grids.fake_quant import grouped, slice_dims
from hf_slim.quantization.grids.grid import GridState, decoded, encoded, observed_state, snapped
from hf_slim.quantization.grids.observers import OBSERVERS
from hf_slim.quantization.grids.packing import pack_codes, unpack_codes

KINDS = [
    *(Grid(bits=bits, granularity=granularity, group_size=8 if granularity == "group" else None)
      for bits in range(2, 9) for granularity in ("tensor", "channel", "group")),
    Grid(bits=4, symmetric=False), Grid(bits=3, symmetric=False, signed=False, granularity="group", group_size=8),
    Grid(bits=8, symmetric=False, signed=False, granularity="tensor"), Grid(bits=4, signed=False),
    Grid(bits=8, rounding="floor"), Grid(bits=4, rounding="floor", symmetric=False, granularity="group", group_size=8),
    Grid("ternary"), Grid("ternary", granularity="tensor"), Grid("nf4", granularity="group", group_size=8),
    Grid("fp4"), Grid("fp8"), Grid("codebook", 3), Grid("codebook", 2, codebook_channels=3),
]  # fmt: skip
SIZES = [1e-30, 1e-3, 1.0, 1e30]


def values(seed=0, rows=6, columns=24):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def state_for(slices, grid, observer="minmax"):
    state = OBSERVERS[observer](slices, grid, slice_dims(grid))
    if not grid.kind_of.learns_codebook:
        return state
    books = len(slices) // (grid.codebook_channels or len(slices))
    return GridState(state.scale, None, fitted_codebook(slices / state.scale, books, grid.bits))


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from(SIZES), st.sampled_from(list(OBSERVERS)))
def test_codes_hold_the_values_that_training_sees(seed, grid, size, observer):
    slices = grouped(values(seed) * size, grid)
    state = state_for(slices, grid, observer)
    on_grid = snapped(slices, grid, state)
    codes = encoded(slices, grid, state)
    stored = unpack_codes(pack_codes(codes, grid.storage_bits), grid.storage_bits, codes.shape[-1])
    assert torch.equal(stored, codes)
    assert torch.equal(decoded(stored, grid, state), on_grid)
    assert torch.equal(snapped(on_grid, grid, state), on_grid)  # twice is once


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([1e-3, 1.0, 1e3]))
def test_no_value_of_the_grid_is_nearer(seed, grid, size):
    """Against every value that the grid's own codes stand for, in float64."""
    slices = grouped(values(seed) * size, grid)
    state = state_for(slices, grid)
    n_codes = 3 if grid.kind == "ternary" else 2**grid.bits
    codes = torch.arange(n_codes, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *slices.shape).contiguous()
    every = torch.stack([decoded(code, grid, state) for code in codes]).double()
    every = (
        every[:127] if grid.kind == "fp8" else every.nan_to_num(torch.inf)
    )  # fp8: NaN codes; signs are tested below
    target = slices.double().abs() if grid.kind == "fp8" else slices.double()
    chosen = snapped(slices, grid, state).double()
    distance = (every - target).abs().amin(0)
    error = ((chosen.abs() if grid.kind == "fp8" else chosen) - target).abs()
    step = state.scale.double()
    if grid.rounding == "floor":  # the value below, not the nearest
        slices = slices.clamp(every.amin(0), every.amax(0))
        assert (chosen <= slices.double() + 2e-3 * step).all()
        assert (slices.double() - chosen <= 1.01 * step).all()
    else:
        assert (error <= distance + 1e-5 * step * 2**grid.bits).all()


@pytest.mark.parametrize("grid", KINDS[:21], ids=lambda grid: f"{grid.bits}-{grid.granularity}")
def test_rounding_moves_a_covered_value_by_at_most_half_a_step(grid):
    slices = grouped(values(), grid)
    state = observed_state(slices, grid, slice_dims(grid))
    # scales in bfloat16 may be 2**-9 too small, and the largest value as much of the range beyond the grid
    slack = 0.5001 + (2**-8 * 2 ** (grid.bits - 1) if grid.scale_dtype == torch.bfloat16 else 0)
    assert ((snapped(slices, grid, state) - slices).abs() <= state.scale * slack).all()


def test_the_mission_s_formula_to_the_letter():
    """y = floor(x * Q + B), Q = 127.5, B = 127, unsigned 8 bits."""
    grid = Grid(granularity="tensor", symmetric=False, signed=False, rounding="floor", scale=1 / 127.5, zero_point=127)
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    expected = torch.floor(x * 127.5 + 127).clamp(0, 255)
    boundary = (x * 127.5 - (x * 127.5).round()).abs() < 1e-3
    state = observed_state(x.float().view(1, 1, -1), grid)
    codes = encoded(x.float().view(1, 1, -1), grid, state).view(-1)
    assert torch.equal(codes[~boundary].double(), expected[~boundary])
    restored = decoded(codes.view(1, 1, -1), grid, state).view(-1)
    torch.testing.assert_close(restored.double(), (codes.double() - 127) / 127.5, rtol=1e-6, atol=1e-9)
    assert decoded(torch.tensor([127], dtype=torch.uint8), grid, state).item() == 0


@pytest.mark.parametrize("grid", [grid for grid in KINDS if grid.kind_of.holds_zero], ids=str)
def test_zero_stays_zero_and_a_slice_of_zeros_is_no_nan(grid):
    data = values()
    data[2] = 0
    data[:, 5] = 0
    slices = grouped(data, grid)
    on_grid = snapped(slices, grid, observed_state(slices, grid, slice_dims(grid))).flatten(1)
    assert torch.isfinite(on_grid).all()
    assert not on_grid[2].any()
    assert not on_grid[:, 5].any()


@pytest.mark.parametrize("grid", KINDS, ids=str)
def test_the_mse_observer_never_rounds_worse_than_minmax(grid):
    slices = grouped(values(), grid)
    errors = {}
    for observer in ("minmax", "mse"):
        state = (
            OBSERVERS[observer](slices, grid, slice_dims(grid)) if grid.kind != "codebook" else state_for(slices, grid)
        )
        errors[observer] = (snapped(slices, grid, state) - slices).square().sum()
    assert errors["mse"] <= errors["minmax"] * 1.0001


def test_a_percentile_ignores_the_outlier_of_a_long_slice():
    data = values(rows=1, columns=5000).view(1, 1, -1)
    data[0, 0, 7] = 1000.0
    grid = Grid(bits=8)
    scale = OBSERVERS["percentile"](data, grid, (2,)).scale
    assert scale.item() < 10 / 127.5
    assert observed_state(data, grid, (2,)).scale.item() > 999 / 127.5


def test_a_fitted_codebook_beats_a_uniform_grid_of_as_many_values():
    data = values(rows=4, columns=512).view(1, -1)
    codebook = fitted_codebook(data, 1, 3)[0]
    assert torch.equal(codebook, codebook.sort().values)
    uniform = torch.linspace(data.min(), data.max(), 8)
    error = {
        name: (data.view(-1, 1) - points).abs().amin(1).square().mean()
        for name, points in (("k-means", codebook), ("uniform", uniform))
    }
    assert error["k-means"] < 0.7 * error["uniform"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 9}, "2 to 8 bits, got 9"),
        ({"kind": "nf4", "bits": 3}, "'nf4' has 4 bits"),
        ({"kind": "nf3"}, "Did you mean 'nf4'"),
        ({"granularity": "row"}, "must be one of tensor, channel, group, token"),
        ({"granularity": "group"}, "`group_size` must be a whole number of at least 1, got None"),
        ({"group_size": 32}, "needs granularity 'group'"),
        ({"scale": 0.0}, "must be positive"),
        ({"scale": -1.0}, "must be positive"),
        ({"zero_point": 3.0}, "needs a given `scale`"),
        ({"kind": "nf4", "symmetric": False}, "belong to integer grids"),
        ({"rounding": "up"}, "nearest, floor"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(settings, says):
    with pytest.raises(SlimError, match=says):
        Grid(**settings)
