import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_slim.quantization.grids.packing import TRIT_BITS, pack_codes, packed_bytes, unpack_codes


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, TRIT_BITS]), st.integers(1, 70), st.integers(1, 3), st.integers(0, 10**6)
)
def test_unpacking_undoes_packing_for_every_width_and_size(bits, size, rows, seed):
    highest = 3 if bits == TRIT_BITS else 2**bits
    codes = torch.randint(0, highest, (rows, 2, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int8
    assert packed.shape == (rows, 2, packed_bytes(size, bits))
    assert torch.equal(unpack_codes(packed, bits, size), codes)


def test_no_bit_is_wasted():
    assert packed_bytes(64, 3) == 24
    assert packed_bytes(65, 3) == 25
    assert packed_bytes(100, TRIT_BITS) == 20


def test_the_first_code_lies_in_the_lowest_bits():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    stream = sum(code << 3 * place for place, code in enumerate(codes[0].tolist()))
    assert pack_codes(codes, 3).view(torch.uint8).tolist() == [list(stream.to_bytes(3, "little"))]
    assert pack_codes(codes, 4).view(torch.uint8).tolist() == [[0x21, 0x43, 0x65, 0x07]]
