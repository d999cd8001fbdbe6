import math

import pytest
import torch

from hf_slim import Grid
from hf_slim.quantization.grids.fake_quant import (
    fake_quantize_static,
    fake_quantize_tokens,
    fake_quantize_weight,
    observed_weight,
    quantize_tokens,
)
from hf_slim.quantization.grids.grid import decoded, encoded
from hf_slim.quantization.grids.kinds import absolute_maximum
from hf_slim.quantization.layers.scale_holders import WeightQuantizer
from hf_slim.quantization.scheme import SCHEMES

FOLLOWING = [Grid(), Grid(bits=4, granularity="group", group_size=4), Grid(bits=3, symmetric=False), Grid("ternary"),
             Grid("nf4", granularity="group", group_size=8), Grid("fp4"), Grid("fp8")]  # fmt: skip
TOKENS = Grid(granularity="token")


def weight(rows=6, columns=16, seed=0, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", FOLLOWING, ids=str)
def test_what_is_trained_is_what_is_stored(grid, dtype):
    master = weight(dtype=dtype)
    state = observed_weight(master, grid)
    slices = master.float().reshape(6, grid.groups(16), -1)
    stored = decoded(encoded(slices, grid, state), grid, state).flatten(1).to(dtype)
    assert torch.equal(fake_quantize_weight(master, grid), stored)


@pytest.mark.parametrize("grid", FOLLOWING, ids=str)
def test_where_scales_follow_the_gradient_passes_straight_through(grid):
    master = weight().requires_grad_()
    upstream = torch.randn(6, 16)
    (fake_quantize_weight(master, grid) * upstream).sum().backward()
    assert torch.equal(master.grad, upstream)


def lsq_reference(w, s, beta, upstream, low, high):
    """LSQ eq. 3 and LSQ+ eq. 3-6, value by value in float64, with LSQ's gradient scale; one scale per row."""
    w, s, beta, upstream = w.double(), s.double(), beta.double(), upstream.double()
    place = (w - beta) / s
    inside = (place >= low) & (place <= high)
    size = 1 / math.sqrt(w.shape[1] * high)
    grad_w = upstream * inside
    grad_s = (upstream * torch.where(inside, place.round() - place, place.clamp(low, high))).sum(
        1, keepdim=True
    ) * size
    grad_beta = (upstream * ~inside).sum(1, keepdim=True) * size
    return place.clamp(low, high).round() * s + beta, grad_w, grad_s, grad_beta


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("with_offset", [False, True])
def test_learned_scales_have_the_gradients_of_the_paper(bits, with_offset):
    master, upstream = weight(8, 64), weight(8, 64, seed=1)
    scale = (torch.rand(8, 1, generator=torch.Generator().manual_seed(2)) + 0.5) * 1.5 / 2 ** (bits - 1)  # some clip
    offset = weight(8, 1, seed=3) * 0.1 if with_offset else torch.zeros(8, 1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    expected = lsq_reference(master, scale, offset, upstream, low, high)
    w, s, b = (value.clone().requires_grad_() for value in (master, scale.view(8, 1, 1), offset.view(8, 1, 1)))
    on_grid = fake_quantize_weight(
        w, Grid(bits=bits, symmetric=not with_offset), scale=s, offset=b if with_offset else None
    )
    (on_grid * upstream).sum().backward()
    clipped = (expected[1] == 0).double().mean()
    assert 0 < clipped < 1
    torch.testing.assert_close(on_grid.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), expected[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(s.grad.view(8, 1).double(), expected[2], rtol=1e-4, atol=1e-5)
    if with_offset:
        torch.testing.assert_close(b.grad.view(8, 1).double(), expected[3], rtol=1e-5, atol=1e-6)


def test_the_lsq_gradient_is_the_slope_of_the_smooth_surrogate():
    """Finite differences in the scale, with rounding offsets held fixed as the straight-through estimator does."""
    master, step = weight(1, 64).double(), 0.3
    place = (master / step).clamp(-8, 7)
    offsets = place.round() - place
    surrogate = lambda s: (((master / s).clamp(-8, 7) + offsets) * s).sum()  # noqa: E731
    slope = (surrogate(step + 1e-6) - surrogate(step - 1e-6)) / 2e-6
    scale = torch.full((1, 1, 1), step, requires_grad=True)
    fake_quantize_weight(master.float(), Grid(bits=4), scale=scale).sum().backward()
    torch.testing.assert_close(scale.grad.item() * math.sqrt(64 * 7), slope.item(), rtol=1e-3, atol=1e-3)


def test_a_scale_that_turns_negative_counts_by_its_magnitude():
    grid = Grid(bits=4)
    positive = torch.full((6, 1, 1), 0.3, requires_grad=True)
    negative = torch.full((6, 1, 1), -0.3, requires_grad=True)
    first, second = (fake_quantize_weight(weight(), grid, scale=scale) for scale in (positive, negative))
    assert torch.equal(first, second)
    first.sum().backward()
    second.sum().backward()
    assert torch.equal(positive.grad, -negative.grad)  # a step down the slope makes both magnitudes move alike


def test_pact_moves_its_range_by_clipped_values_only():
    """PACT eq. 3: the slope in the clipping value is 1 where x reaches it, else 0."""
    x = torch.tensor([[-3.0, -0.2, 0.4, 1.2, 5.0]])
    grid = Grid(bits=4, granularity="tensor", signed=False)
    clip = 2.0
    scale = torch.full((1, 1, 1), clip / 15, requires_grad=True)
    fake_quantize_static(x, grid, scale, None, None, "pact").sum().backward()
    assert scale.grad.item() == pytest.approx(15.0)  # d clip / d scale for the one clipped above; below clips to 0


def test_the_codebook_gradient_is_the_sum_over_its_users():
    """Deep Compression eq. 3, value by value; also against finite differences of the surrogate with fixed codes."""
    grid = Grid("codebook", 2, codebook_channels=3)
    master, upstream = weight(6, 16), weight(6, 16, seed=1)
    quantizer = WeightQuantizer(grid, (6, 16))
    quantizer.observe_(master)
    (quantizer(master) * upstream).sum().backward()
    scale = observed_weight(master, grid).scale.squeeze(-1).double()
    codes = encoded(master.view(6, 1, 16), grid, quantizer.state(master)).view(6, 16)
    expected = torch.zeros(2, 4, dtype=torch.double)
    for row in range(6):
        for column in range(16):
            expected[row // 3, codes[row, column].item()] += upstream[row, column].double() * scale[row, 0]
    torch.testing.assert_close(quantizer.codebook.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_codebook_that_training_put_out_of_order_still_finds_the_nearest():
    grid = Grid("codebook", 2)
    quantizer = WeightQuantizer(grid, (6, 16))
    quantizer.codebook.data = torch.tensor([[0.9, -0.8, 0.1, -0.2]])
    on_grid = quantizer(weight())
    scale = weight().abs().amax(1, keepdim=True)
    nearest = (weight() / scale).unsqueeze(-1).sub(quantizer.codebook[0]).abs().argmin(-1)
    torch.testing.assert_close(on_grid, quantizer.codebook[0][nearest] * scale)


def test_each_token_has_its_own_scale():
    activations = torch.randn(2, 3, 8) * torch.tensor([1.0, 100.0, 1e-4]).view(1, 3, 1)
    step = absolute_maximum(activations, (-1,)) / 127.5
    assert ((fake_quantize_tokens(activations, TOKENS) - activations).abs() <= step * 0.5001).all()
    codes, scale = quantize_tokens(activations, TOKENS)
    assert torch.equal(codes.float() * scale, fake_quantize_tokens(activations, TOKENS))


@pytest.mark.parametrize("grid", [*FOLLOWING, Grid("codebook", 3)], ids=str)
def test_groups_form_among_the_columns_that_pruning_leaves(grid):
    kept = torch.tensor([0, 2, 3, 5, 7, 8, 11, 13, 15])
    gone = [column for column in range(16) if column not in kept]
    master = weight()
    master[:, gone] = 0
    quantizer = WeightQuantizer(grid, (6, 16))
    quantizer.observe_(master)
    masked = quantizer(master, kept)
    smaller = quantizer(master[:, kept].contiguous())  # nine columns: the last group is short
    assert torch.equal(masked[:, kept], smaller)
    assert not masked[:, gone].any()


@pytest.mark.parametrize("name", list(SCHEMES))
def test_an_empty_weight_stays_empty(name):
    assert fake_quantize_weight(torch.zeros(4, 0), SCHEMES[name].weights).shape == (4, 0)
    assert fake_quantize_weight(torch.zeros(0, 64), SCHEMES[name].weights).shape == (0, 64)
