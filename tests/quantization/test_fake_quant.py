import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_slim.quantization.config import Scheme
from hf_slim.quantization.fake_quant import (
    absmax_scale,
    dequantize_weight,
    fake_quantize_tokens,
    fake_quantize_weight,
    quantize_tokens,
    quantize_weight,
)

SCHEMES = [Scheme(8), Scheme(4), Scheme(4, group_size=4), Scheme(8, group_size=8)]


def weight(rows=6, columns=16, seed=0, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_grid_point_is_nearer_by_a_float64_reference(scheme):
    master = weight()
    groups = master.double().reshape(len(master), scheme.groups(16), -1)
    scale = groups.abs().amax(-1, keepdim=True) / ((2**scheme.weight_bits - 1) / 2)
    limit = 2 ** (scheme.weight_bits - 1)
    nearest = (groups / scale).round().clamp(-limit, limit - 1) * scale
    quantized = fake_quantize_weight(master, scheme).double().reshape(groups.shape)
    # compared by distance: the largest weight of a group lies half-way between two points, and either is right
    assert ((quantized - groups).abs() <= (nearest - groups).abs() + 1e-5 * scale).all()
    on_grid = quantized / scale
    torch.testing.assert_close(on_grid, on_grid.round(), rtol=0, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SCHEMES), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_rounding_moves_a_weight_by_at_most_half_a_step(seed, scheme, size):
    master = weight(seed=seed) * size
    _, scale = quantize_weight(master, scheme)
    step = scale.repeat_interleave(16 // scheme.groups(16), dim=1)
    assert ((fake_quantize_weight(master, scheme) - master).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_trained_is_what_is_stored(scheme, dtype):
    master = weight(dtype=dtype)
    stored = dequantize_weight(*quantize_weight(master, scheme), 16, dtype)
    assert torch.equal(fake_quantize_weight(master, scheme), stored)


def test_a_row_of_zeros_stays_zeros():
    master = weight()
    master[2] = 0
    quantized = fake_quantize_weight(master, Scheme(8))
    assert torch.equal(quantized[2], torch.zeros(16))
    assert torch.isfinite(quantized).all()


def test_the_gradient_passes_straight_through():
    master = weight().requires_grad_()
    upstream = torch.randn(6, 16)
    (fake_quantize_weight(master, Scheme(4, group_size=4)) * upstream).sum().backward()
    assert torch.equal(master.grad, upstream)


def test_each_token_has_its_own_scale():
    activations = torch.randn(2, 3, 8) * torch.tensor([1.0, 100.0, 1e-4]).view(1, 3, 1)
    error = (fake_quantize_tokens(activations, 8) - activations).abs()
    assert (error <= absmax_scale(activations, 8) * 0.5001).all()
    codes, scale = quantize_tokens(activations)
    assert torch.equal(codes.float() * scale, fake_quantize_tokens(activations, 8))


def test_groups_form_among_the_columns_that_pruning_leaves():
    master, scheme = weight(), Scheme(4, group_size=4)
    kept = torch.tensor([0, 2, 3, 5, 7, 8, 11, 13, 15])
    masked = fake_quantize_weight(master, scheme, kept)
    smaller = fake_quantize_weight(master[:, kept].contiguous(), scheme)  # nine columns: the last group is short
    assert torch.equal(masked[:, kept], smaller)
    gone = [column for column in range(16) if column not in kept]
    assert not masked[:, gone].any()
