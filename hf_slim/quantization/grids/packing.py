"""Packing of codes into bytes, as they are stored on disk."""

import math

import torch
from torch import Tensor

ROWS_AS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
TRIT_BITS = 8 / 5  # five ternary values in a byte: 3**5 = 243


def packed_bytes(size: int, bits: float) -> int:
    """Bytes that `size` codes of `bits` bits take."""
    return math.ceil(size * bits / 8)


def pack_codes(codes: Tensor, bits: float) -> Tensor:
    """Codes as a stream of bits; the first code has the lowest bits of the first byte.

    Args:
        codes: `(..., size)`, uint8, each below 2**bits, or below 3 where bits is 8/5.
        bits: 1 to 8, or 8/5.
    Returns: `(..., n_bytes)`, int8.
    """
    if bits == 8:
        return codes.contiguous().view(torch.int8)
    per_word, bytes_per_word, weights = _word(bits, codes.device)
    size = codes.shape[-1]
    words = torch.nn.functional.pad(codes, (0, -size % per_word)).unflatten(-1, (-1, per_word))
    if bytes_per_word == 1:
        packed = (words * weights.to(torch.uint8)).sum(-1, dtype=torch.uint8)
    else:  # eight codes fill `bits` whole bytes
        packed = (words.long() * weights).sum(-1, keepdim=True).view(torch.uint8)[..., :bytes_per_word].flatten(-2)
    return packed[..., : packed_bytes(size, bits)].contiguous().view(torch.int8)


def unpack_codes(packed: Tensor, bits: float, size: int) -> Tensor:
    """The codes that `pack_codes` stored: `(..., size)`, uint8."""
    packed = packed.view(torch.uint8)
    if bits == 8:
        return packed
    per_word, bytes_per_word, weights = _word(bits, packed.device)
    if bits == TRIT_BITS:
        codes = packed.unsqueeze(-1).div(weights.to(torch.uint8), rounding_mode="floor").remainder_(3)
    elif bytes_per_word == 1:
        codes = look_up_bytes(packed, every_code(int(bits), packed.device)).unflatten(-1, (-1, per_word))
    else:
        padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bytes_per_word))
        words = padded.new_zeros(*padded.shape[:-1], padded.shape[-1] // bytes_per_word, 8)
        words[..., :bytes_per_word] = padded.unflatten(-1, (-1, bytes_per_word))
        shifts = torch.arange(per_word, device=packed.device) * int(bits)
        codes = (words.view(torch.int64) >> shifts).bitwise_and_(2 ** int(bits) - 1).to(torch.uint8)
    return codes.flatten(-2)[..., :size]


def every_code(bits: int, device: torch.device) -> Tensor:
    """The codes that every byte holds, for 1, 2 or 4 bits: `(256, 8 / bits)`, uint8."""
    shifts = torch.arange(0, 8, bits, device=device)
    return (torch.arange(256, device=device).unsqueeze(1) >> shifts).bitwise_and_(2**bits - 1).to(torch.uint8)


def look_up_bytes(packed: Tensor, table: Tensor) -> Tensor:
    """A row of `table` for every byte of `packed`: `(..., n_bytes * row)`, in the dtype of the table.

    Each row is read as one number of the same size, so that one look-up gives several values: twice as fast as shifts.

    Args:
        table: `(256, row)`; a row takes 1, 2, 4, 8 or 16 bytes.
    """
    whole_row = ROWS_AS[table.shape[1] * table.itemsize]
    places = packed.reshape(-1).view(torch.uint8).int()
    rows = table.contiguous().view(whole_row).view(-1).index_select(0, places)
    return rows.view(table.dtype).view(*packed.shape[:-1], packed.shape[-1] * table.shape[1])


def _word(bits: float, device: torch.device) -> tuple[int, int, Tensor]:
    """Codes per word, bytes per word, and the factor of each code in a word."""
    if bits == TRIT_BITS:
        return 5, 1, 3 ** torch.arange(5, device=device)
    per_word = 8 // int(bits) if bits in (1, 2, 4) else 8
    return per_word, per_word * int(bits) // 8, 1 << torch.arange(per_word, device=device) * int(bits)
