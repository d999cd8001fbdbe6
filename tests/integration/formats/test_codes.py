"""Layouts of other libraries against references that count bits one by one, and back without a change."""

import pytest
import torch
from torch import nn

from hf_slim.integration.formats import codes as layout
from hf_slim.quantization.grids.fake_quant import grouped, observed_weight
from hf_slim.quantization.layers.packed import PackedLinear
from hf_slim.quantization.scheme import Scheme
from hf_slim.quantization.storage import fill_storage_

SCHEMES = [
    f"w{bits}a16{option}" for bits in range(2, 9) for option in ("", "-g8", "-asym", "-unsigned-asym", "-tensor")
]


def packed(scheme: str, rows: int = 6, columns: int = 24, seed: int | None = None) -> PackedLinear:
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    layer = PackedLinear(columns, rows, None, Scheme.of(scheme))
    weight = torch.randn(rows, columns, generator=generator) + 0.3
    fill_storage_(layer, "weight", weight, observed_weight(weight, layer.scheme.weights))
    return layer


def bits_of(number: int, count: int) -> list[int]:
    return [number >> place & 1 for place in range(count)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_scales_and_zero_points_are_the_values(scheme):
    layer = packed(scheme)
    codes, scales = layout.signed_codes(layer), layout.row_scales(layer)
    points = layout.signed_zero_points(layer)
    grid = layer.scheme.weights
    assert codes.dtype == torch.int8
    assert codes.min().item() >= -layout.half(grid)
    assert codes.max().item() < layout.half(grid)
    in_groups = codes.float().view(len(codes), scales.shape[1], -1)
    shifted = in_groups if points is None else in_groups - points.unsqueeze(-1)
    values = (shifted * scales.float().unsqueeze(-1)).flatten(1)
    assert torch.equal(values, layer.dequantized(torch.float32))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_taken_out_of_a_layer_goes_back_as_it_was(scheme):
    layer = packed(scheme)
    grid = layer.scheme.weights
    assert torch.equal(layout.from_signed_codes(layout.signed_codes(layer), grid), layer.weight)
    assert torch.equal(layout.own_scales(layer, layout.row_scales(layer)), layer.weight_scale)
    points = layout.signed_zero_points(layer)
    if not grid.symmetric:
        assert layout.are_whole(layer)
        assert torch.equal(layout.from_signed_zero_points(layer, points.to(torch.int8)), layer.weight_zero_point)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 5, 32, 45])
def test_words_are_a_dense_stream_of_bits(bits, columns):
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, -low, (3, columns), dtype=torch.int8)
    words = layout.to_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (3, -(-columns * bits // 32))
    for row, packed_row in zip(codes.tolist(), words.tolist(), strict=True):
        stream = [bit for code in row for bit in bits_of(code - low, bits)]
        found = [bit for word in packed_row for bit in bits_of(word & 0xFFFFFFFF, 32)]
        assert found == stream + [0] * (len(found) - len(stream))
    assert torch.equal(layout.from_words(words, bits, columns), codes)


def test_fractional_zero_points_are_noticed():
    layer = packed("w4a16-asym")
    assert layout.are_whole(layer)
    layer.weight_zero_point[0, 0] += 0.5
    assert not layout.are_whole(layer)
    layer.weight_zero_point[0, 0] = 99
    assert not layout.are_whole(layer)


def test_a_fixed_scale_is_written_for_every_row():
    scheme = {"weights": {"bits": 4, "scale": 0.25, "granularity": "tensor"}}
    layer = PackedLinear(8, 3, None, Scheme.of(scheme))
    weight = torch.randn(3, 8)
    state = observed_weight(weight, layer.scheme.weights)
    fill_storage_(layer, "weight", weight, state)
    scales = layout.row_scales(layer)
    assert torch.equal(scales, torch.full((3, 1), 0.25))
    values = layout.signed_codes(layer).float() * scales
    assert torch.equal(values, layer.dequantized(torch.float32))


def test_groups_are_those_of_the_grid():
    layer = packed("w4a16-g8")
    assert layout.stored_codes(layer).shape == (6, 24)
    assert grouped(torch.zeros(6, 24), layer.scheme.weights).shape == (6, 3, 8)
    assert layout.row_scales(layer).shape == (6, 3)
    assert isinstance(layer, nn.Linear)
