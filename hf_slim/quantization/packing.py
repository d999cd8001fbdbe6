"""Integer codes as bytes: what lies on disk."""

import torch
from torch import Tensor

from hf_slim.quantization.config import Scheme


def packed_bytes(scheme: Scheme, in_features: int) -> int:
    """Bytes that one group of one output channel takes."""
    return ((scheme.group_size or in_features) * scheme.weight_bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes.

    Args:
        codes: `(out_features, n_groups, group_size)`, int8, each within `bits` bits.
        bits: 8, or 4: two codes a byte, the first in the low half.
    Returns: `(out_features, n_groups, n_bytes)`, int8. A group of odd length is padded with one zero code.
    """
    if bits == 8:
        return codes.contiguous()
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[..., 0::2] & 0xF) | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor, bits: int, group_size: int) -> Tensor:
    """The codes that `pack_codes` stored: `(out_features, n_groups, group_size)`, int8."""
    if bits == 8:
        return packed
    low = packed << 4 >> 4  # shifts of signed bytes: the sign comes back by itself
    high = packed >> 4
    return torch.stack((low, high), dim=-1).flatten(-2)[..., :group_size]
