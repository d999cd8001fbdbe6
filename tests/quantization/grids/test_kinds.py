"""What each family of grids observes, rounds to and stores, value by value in float64."""

import pytest
import torch
from torch import Tensor

from hf_slim import Grid, SlimError
from hf_slim.quantization.grids.grid import GRIDS, TINY
from hf_slim.quantization.grids.kinds import FP4, NF4, absolute_maximum, nearest_entries

ALLOWED_BITS = {"int": range(2, 9), "ternary": (2,), "fp8": (8,), "nf4": (4,), "fp4": (4,), "codebook": (2, 3, 4)}
SLICES = [("channel", (2,)), ("tensor", (0, 1, 2))]


def values(seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(5, 2, 12, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize("kind", list(GRIDS))
def test_each_kind_has_its_bits(kind):
    for bits in range(1, 10):
        if bits in ALLOWED_BITS[kind]:
            assert Grid(kind, bits).bits == bits
        else:
            with pytest.raises(SlimError, match=rf"kind '{kind}' has .* bits, got {bits}"):
                Grid(kind, bits)
    assert Grid(kind).bits == max(ALLOWED_BITS[kind])


def test_codes_of_ternary_grids_lie_five_to_a_byte():
    assert Grid("ternary").storage_bits == 1.6


@pytest.mark.parametrize("dims", [(2,), (0, 1, 2), (-1,)])
def test_the_absolute_maximum_is_over_both_signs(dims):
    for sign in (1, -1):
        slices = sign * values(shift=1.0)
        assert torch.equal(absolute_maximum(slices, dims), slices.abs().amax(dims, keepdim=True))
    assert absolute_maximum(values().bfloat16(), dims).dtype == torch.float32


@pytest.mark.parametrize(("granularity", "dims"), SLICES)
@pytest.mark.parametrize("shift", [-4.0, 0.0, 4.0])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_cover_the_range_of_their_slice(bits, symmetric, signed, shift, granularity, dims):
    """Jacob et al. 2018, eq. 1 and sec. 3: zero is on the grid, and a symmetric one has it in the middle or at 0."""
    grid = Grid(bits=bits, symmetric=symmetric, signed=signed, granularity=granularity)
    slices = values(shift=shift)
    scale, zero_point = GRIDS["int"].observe(slices, dims, grid)
    wide = slices.double()
    high, low = (wide.amax(dims, keepdim=True).clamp(min=0), wide.amin(dims, keepdim=True).clamp(max=0))
    first, last = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    assert GRIDS["int"].limits(grid) == (first, last)
    if symmetric:
        assert zero_point is None
        expected = 2 * torch.maximum(high, -low) / (2**bits - 1) if signed else high / (2**bits - 1)
        torch.testing.assert_close(scale.double(), expected.clamp(min=TINY))
    else:
        expected = (high - low) / (2**bits - 1)
        torch.testing.assert_close(scale.double(), expected)
        ends = low / expected + zero_point, high / expected + zero_point
        assert (ends[0] >= first - 0.5001).all()
        assert (ends[1] <= last + 0.5001).all()
        assert torch.equal(zero_point, zero_point.round())


@pytest.mark.parametrize("rounding", ["nearest", "floor"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_integers_round_to_whole_numbers_within_their_limits(bits, signed, rounding):
    grid = Grid(bits=bits, signed=signed, symmetric=signed, rounding=rounding)
    first, last = GRIDS["int"].limits(grid)
    places = torch.linspace(first - 2.9, last + 2.9, 997)
    expected = (places.round() if rounding == "nearest" else (places + 2**-12).floor()).clamp(first, last)
    assert torch.equal(GRIDS["int"].snap_(places.clone(), grid, None), expected)
    codes = GRIDS["int"].encode(places.clone(), grid, None)
    assert torch.equal(codes.long(), expected.long() % 2**bits)  # two's complement
    assert torch.equal(GRIDS["int"].decode(codes, grid, None), expected)


@pytest.mark.parametrize("whole", [-127, -3, 0, 5, 126])
def test_a_value_that_lies_a_rounding_error_below_the_grid_is_on_it(whole):
    grid = Grid(bits=8, rounding="floor")
    place = torch.tensor([whole - 2.0**-15, whole - 2.0**-10])
    assert GRIDS["int"].snap_(place, grid, None).tolist() == [whole, whole - 1]


@pytest.mark.parametrize(("granularity", "dims"), SLICES)
def test_ternary_grids_have_the_mean_magnitude_of_what_is_not_zero(granularity, dims):
    slices = values()
    slices[:, :, ::3] = 0
    slices[2] = 0
    slices[3, :, 1:] = 0  # two slices of a single value
    grid = Grid("ternary", granularity=granularity)
    scale, zero_point = GRIDS["ternary"].observe(slices, dims, grid)
    count = (slices != 0).sum(dims, keepdim=True)
    expected = slices.double().abs().sum(dims, keepdim=True) / count.clamp(min=1)
    torch.testing.assert_close(scale.double(), expected.clamp(min=TINY))
    assert (scale > 0).all()
    assert zero_point is None
    places = torch.tensor([-9.0, -0.6, -0.4, 0.0, 0.4, 0.6, 1.4, 9.0])
    rounded = torch.tensor([-1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    assert torch.equal(GRIDS["ternary"].snap_(places.clone(), grid, None), rounded)
    codes = GRIDS["ternary"].encode(places.clone(), grid, None)
    assert torch.equal(codes, (rounded + 1).to(torch.uint8))
    assert torch.equal(GRIDS["ternary"].decode(codes, grid, None), rounded)
    assert GRIDS["ternary"].limits(grid) == (-1, 1)


@pytest.mark.parametrize(("granularity", "dims"), SLICES)
@pytest.mark.parametrize(("kind", "largest"), [("fp8", 448.0), ("nf4", 1.0), ("fp4", 1.0), ("codebook", 1.0)])
def test_other_grids_reach_as_far_as_the_largest_magnitude(kind, largest, granularity, dims):
    grid = Grid(kind, granularity=granularity)
    slices = values()
    slices[1] = 0
    scale, zero_point = GRIDS[kind].observe(slices, dims, grid)
    expected = slices.double().abs().amax(dims, keepdim=True) / largest
    torch.testing.assert_close(scale.double(), expected.clamp(min=TINY))
    assert (scale > 0).all()
    assert zero_point is None
    assert GRIDS[kind].limits(grid) == (-largest, largest)


def test_8_bit_floats_have_three_bits_of_mantissa_and_no_infinity():
    """Micikevicius et al. 2022, table 1: 2**exponent * (1 + mantissa / 8), subnormal from 2**-9, at most 448."""
    magnitudes = [2.0**exponent * (1 + mantissa / 8) for exponent in range(-6, 9) for mantissa in range(8)][:-1]
    magnitudes = torch.tensor([0.0, *(mantissa * 2.0**-9 for mantissa in range(1, 8)), *magnitudes])
    grid = Grid("fp8")
    places = torch.cat([values().flatten() * size for size in (1e-3, 1.0, 100.0, 1e6)])
    nearest = magnitudes[(places.abs().unsqueeze(1) - magnitudes).abs().argmin(1)] * places.sign()
    assert torch.equal(GRIDS["fp8"].snap_(places.clone(), grid, None), nearest)
    beyond = GRIDS["fp8"].snap_(torch.tensor([torch.inf, -torch.inf]), grid, None)
    assert beyond.tolist() == [448, -448]
    codes = GRIDS["fp8"].encode(places.clone(), grid, None)
    assert codes.dtype == torch.uint8
    assert torch.equal(GRIDS["fp8"].decode(codes, grid, None), nearest)


@pytest.mark.parametrize(("kind", "table"), [("nf4", NF4), ("fp4", FP4)])
def test_tables_round_to_their_nearest_value_and_store_its_place(kind, table):
    entries = torch.tensor(table)
    places = torch.rand(7, 2, 30, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    nearest = (places.unsqueeze(-1) - entries).abs().argmin(-1)
    grid = Grid(kind)
    assert torch.equal(GRIDS[kind].snap_(places.clone(), grid, None), entries[nearest])
    codes = GRIDS[kind].encode(places.clone(), grid, None)
    assert codes.dtype == torch.uint8
    assert torch.equal(entries[codes.long()], entries[nearest])
    assert torch.equal(GRIDS[kind].decode(codes, grid, None), entries[nearest])


def books(count: int, entries: int, spread: float = 1.0) -> Tensor:
    drawn = torch.rand(count, entries, generator=torch.Generator().manual_seed(entries))
    return (spread * (2 * drawn - 1)).sort(dim=-1).values


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 3.0])
@pytest.mark.parametrize("entries", [1, 2, 4, 16])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_every_value_finds_the_nearest_entry_of_its_own_codebook(count, entries, spread, compiling, monkeypatch):
    """A spread of 1e-3 puts all entries into one cell of the table, one of 3 puts some beyond its ends."""
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiling)
    codebook = books(count, entries, spread)
    scaled = torch.randn(6, 2, 40, generator=torch.Generator().manual_seed(1)) * spread
    middles = (codebook[:, 1:] + codebook[:, :-1]) / 2
    scaled.view(count, -1)[:, : entries - 1] = middles  # half-way between two: the lower one
    book_of_row = codebook.repeat_interleave(6 // count, 0)[:, None, None]
    expected = (scaled.unsqueeze(-1) > (book_of_row[..., 1:] + book_of_row[..., :-1]) / 2).sum(-1)
    found = nearest_entries(scaled, codebook)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), expected)
    distance = (scaled.double().unsqueeze(-1) - book_of_row.double()).abs()
    chosen = distance.gather(-1, expected.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, distance.amin(-1), rtol=0, atol=1e-6 * spread)


def test_a_value_that_is_no_number_gets_some_entry():
    places = nearest_entries(torch.tensor([[0.5, torch.nan, -0.5]]), books(1, 4))
    assert ((places >= 0) & (places < 4)).all()


@pytest.mark.parametrize("count", [1, 3])
def test_learned_codebooks_give_the_values_of_their_own_rows(count):
    codebook, scaled = books(count, 8), values().repeat(3, 1, 1)[:6]
    grid = Grid("codebook", 3)
    kind = GRIDS["codebook"]
    places = nearest_entries(scaled, codebook).long()
    expected = codebook.repeat_interleave(6 // count, 0)[:, None, :].expand(6, 2, 8).gather(-1, places)
    assert torch.equal(kind.snap_(scaled.clone(), grid, codebook), expected)
    codes = kind.encode(scaled.clone(), grid, codebook)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), places)
    assert torch.equal(kind.decode(codes, grid, codebook), expected)
