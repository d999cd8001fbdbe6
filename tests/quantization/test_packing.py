import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_slim.quantization.config import Scheme
from hf_slim.quantization.packing import pack_codes, packed_bytes, unpack_codes


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(0, 10**6))
def test_unpacking_restores_every_code(bits, rows, groups, size, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, groups, size), generator=generator).to(
        torch.int8
    )
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int8
    assert torch.equal(unpack_codes(packed, bits, size), codes)


@pytest.mark.parametrize(("bits", "group_size", "expected"), [(8, None, 10), (4, None, 5), (4, 5, 3), (8, 5, 5)])
def test_the_bytes_of_a_group_are_known_before_packing(bits, group_size, expected):
    scheme = Scheme(bits, group_size=group_size)
    assert packed_bytes(scheme, 10) == expected
    codes = torch.zeros(2, scheme.groups(10), group_size or 10, dtype=torch.int8)
    assert pack_codes(codes, bits).shape[-1] == expected
