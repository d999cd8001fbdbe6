"""Blocks of GGUF hold code * scale, as the package `gguf` reads them: every format, every code of its range."""

from itertools import pairwise

import numpy as np
import pytest

from hf_slim.export.gguf.blocks import BLOCK, FORMATS, BlockFormat, packed_rows

gguf = pytest.importorskip("gguf", reason="needs the package gguf")


def named(form: BlockFormat) -> str:
    return form.name


@pytest.mark.parametrize("form", FORMATS, ids=named)
def test_what_is_read_back_is_code_times_scale(form):
    generator = np.random.default_rng()
    codes = generator.integers(form.low, form.high + 1, (6, 2 * form.columns)).astype(np.int16)
    codes[0, :2], codes[1] = (form.low, form.high), 0
    scale = np.float16(generator.uniform(1e-7, 50, (6, 2)))
    data = packed_rows(codes, scale, form)
    read = gguf.dequantize(data, gguf.GGMLQuantizationType[form.name])
    assert np.array_equal(read, codes.astype(np.float32) * scale.astype(np.float32).repeat(form.columns, axis=1))


@pytest.mark.parametrize("form", FORMATS, ids=named)
def test_sizes_are_those_of_the_format(form):
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form.name]]
    assert (form.columns, form.bits) == (columns, 8 * size / columns)
    assert form.columns % BLOCK == 0


def test_smaller_formats_come_first_and_hold_fewer_codes():
    assert [form.bits for form in FORMATS] == sorted(form.bits for form in FORMATS)
    assert all(later.holds(form.low, form.high) for form, later in pairwise(FORMATS))
