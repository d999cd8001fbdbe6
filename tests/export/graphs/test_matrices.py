"""Codes in the order of an operator are the values that training saw, bit for bit."""

import pytest
import torch
from torch import nn

from hf_slim.export.codes import codes_of, float_values
from hf_slim.export.graphs.matrices import (
    as_blocks,
    as_integers,
    block_of,
    multiplies_integers,
    values_of,
    width_of,
)
from hf_slim.quantization.scheme import Scheme
from tests.export.graphs.mixed import packed_layer

PATH = "0.weight"
IN_BLOCKS = {  # scheme -> bits of a stored code, and block, for rows of 48
    "w2a16": (2, 16), "w2a16-g16": (2, 16), "w3a16-g32": (4, 32), "w4a16-g16": (4, 16), "w4a16-g48": (4, 16),
    "w5a16-g64": (8, 16), "w8a16": (8, 16), "w8a16-g32": (8, 32), "w8a16-tensor": (8, 16),
    "w4a16-unsigned": (8, 16), "w1.58a8": (2, 16),
}  # fmt: skip


def packed(scheme: str, columns: int = 48, rows: int = 24) -> nn.Module:
    return nn.Sequential(packed_layer(nn.Linear(columns, rows), scheme))


@pytest.mark.parametrize("scheme", IN_BLOCKS)
def test_blocks_hold_the_values_of_the_layer(scheme):
    model = packed(scheme)
    matrix = as_blocks(codes_of(model, PATH))
    assert (matrix.bits, matrix.block) == IN_BLOCKS[scheme]
    assert torch.equal(values_of(matrix), float_values(model, PATH))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w8a8-tensor", "w1.58a8"])
def test_integers_hold_the_values_of_the_layer(scheme):
    model = packed(scheme)
    matrix = as_integers(codes_of(model, PATH))
    assert matrix.codes.shape == (48, 24)  # columns first
    assert torch.equal(values_of(matrix), float_values(model, PATH))


@pytest.mark.parametrize("columns", [16, 50, 64, 100])
def test_rows_of_any_length_are_cut_into_blocks(columns):
    for scheme in ("w4a16-g32", "w4a16-g48", "w8a16"):
        model = packed(scheme, columns)
        assert torch.equal(values_of(as_blocks(codes_of(model, PATH))), float_values(model, PATH))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_first_code_lies_in_the_lowest_bits(bits):
    codes = codes_of(packed(f"w{bits}a16-g16", 64), PATH)
    words = as_blocks(codes).codes.flatten(1).int()
    place = torch.arange(64)
    stored = (words[:, place * bits // 8] >> (place * bits % 8)) & (2**bits - 1)
    assert torch.equal(stored - 2 ** (bits - 1), codes.codes.int())


@pytest.mark.parametrize("scheme", ["nf4", "codebook4", "fp8", "w4a16-asym", "w8a16-unsigned"])
def test_grids_without_such_codes_have_no_width(scheme):
    assert width_of(Scheme.of(scheme).weights) is None


@pytest.mark.parametrize("size", [10, 24, 40])
def test_groups_that_no_block_divides_have_no_block(size):
    assert block_of(Scheme.of(f"w4a16-g{size}").weights, 480) is None


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [("w8a8", True), ("w4a8", True), ("w1.58a8", True), ("w8a8-static", True), ("w4a8-g32", False),
     ("w8a16", False), ("fp8", False), ("w8a8-asym", False)],
)  # fmt: skip
def test_whole_numbers_are_multiplied_where_each_row_has_one_scale(scheme, expected):
    assert multiplies_integers(Scheme.of(scheme)) is expected
