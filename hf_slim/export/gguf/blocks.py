"""Codes and scales as the blocks of GGUF: each format's range of codes, and how its bytes are laid out.

Source: `dequantize_blocks` of every format in the Python package `gguf`, which these layouts are the inverse of.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int16]  # (blocks, columns)
Scale = NDArray[np.float16]  # (blocks, 1)
Bytes = NDArray[np.uint8]  # (blocks, bytes)


@dataclass(frozen=True)
class BlockFormat:
    """A format whose value is code * scale, with one float16 scale in every block.

    Attributes:
        name: As `gguf.GGMLQuantizationType` calls it.
        columns: Values in one block; the length of a row must be a multiple of it.
        low: The least code.
        high: The greatest code.
        bits: Bits per value, with the scale.
        pack: The bytes of blocks.
    """

    name: str
    columns: int
    low: int
    high: int
    bits: float
    pack: Callable[[Codes, Scale], Bytes]

    def holds(self, low: float, high: float) -> bool:
        """Whether codes from `low` to `high` are in its range."""
        return self.low <= low and high <= self.high


def _bytes_of(scale: Scale) -> Bytes:
    return scale.astype("<f2").view(np.uint8)


def _unsigned(codes: Codes, low: int) -> Bytes:
    return (codes - low).astype(np.uint8)


def _repeated(byte: int, count: int, blocks: int) -> Bytes:
    return np.full((blocks, count), byte, np.uint8)


def _fields(codes: Bytes, chunks: int, fields: int, bits: int) -> Bytes:
    """Codes cut into `chunks`, each of `fields` runs that share their bytes; the first run has the lowest bits."""
    runs = codes.reshape(len(codes), chunks, fields, -1).astype(np.uint16)
    shifts = np.arange(fields, dtype=np.uint16).reshape(1, 1, fields, 1) * bits
    return (runs << shifts).sum(axis=2).astype(np.uint8).reshape(len(codes), -1)


def _q4_0(codes: Codes, scale: Scale) -> Bytes:
    return np.concatenate((_bytes_of(scale), _fields(_unsigned(codes, -8), 1, 2, 4)), axis=1)


def _q5_0(codes: Codes, scale: Scale) -> Bytes:
    shifted = _unsigned(codes, -16)
    fifth_bits = np.packbits(shifted >> 4, axis=1, bitorder="little")
    return np.concatenate((_bytes_of(scale), fifth_bits, _fields(shifted & 15, 1, 2, 4)), axis=1)


def _q8_0(codes: Codes, scale: Scale) -> Bytes:
    return np.concatenate((_bytes_of(scale), codes.astype(np.int8).view(np.uint8)), axis=1)


def _tq2_0(codes: Codes, scale: Scale) -> Bytes:
    return np.concatenate((_fields(_unsigned(codes, -1), 2, 4, 2), _bytes_of(scale)), axis=1)


def _q2_k(codes: Codes, scale: Scale) -> Bytes:
    """Value = d * 1 * q - dmin * 2, with dmin = d: the inner scales are 1 and 2, in the two halves of a byte."""
    inner = _repeated(0x21, 16, len(codes))
    return np.concatenate((inner, _fields(_unsigned(codes, -2), 2, 4, 2), _bytes_of(scale), _bytes_of(scale)), axis=1)


def _q3_k(codes: Codes, scale: Scale) -> Bytes:
    """Value = d * (33 - 32) * q; the inner scales are 33: low halves of 1, high pairs of bits of 2."""
    shifted = _unsigned(codes, -4)
    inner = (_repeated(0x11, 8, len(codes)), _repeated(0xAA, 4, len(codes)))
    low, high = _fields(shifted & 3, 2, 4, 2), _fields(shifted >> 2, 1, 8, 1)
    return np.concatenate((high, low, *inner, _bytes_of(scale)), axis=1)


def _q6_k(codes: Codes, scale: Scale) -> Bytes:
    """Value = d * 1 * q; the inner scales, one signed byte for 16 values, are 1."""
    shifted = _unsigned(codes, -32)
    low, high = _fields(shifted & 15, 2, 2, 4), _fields(shifted >> 4, 2, 4, 2)
    return np.concatenate((low, high, _repeated(1, 16, len(codes)), _bytes_of(scale)), axis=1)


FORMATS = (  # the smallest first
    BlockFormat("TQ2_0", 256, -1, 1, 2.0625, _tq2_0),
    BlockFormat("Q2_K", 256, -2, 1, 2.625, _q2_k),
    BlockFormat("Q3_K", 256, -4, 3, 3.4375, _q3_k),
    BlockFormat("Q4_0", 32, -8, 7, 4.5, _q4_0),
    BlockFormat("Q5_0", 32, -16, 15, 5.5, _q5_0),
    BlockFormat("Q6_K", 256, -32, 31, 6.5625, _q6_k),
    BlockFormat("Q8_0", 32, -128, 127, 8.5, _q8_0),
)
BLOCK = 32  # the shortest block: the length of every quantized row is a multiple of it


def packed_rows(codes: Codes, scale: Scale, form: BlockFormat) -> Bytes:
    """The rows of a matrix in a format: `(rows, bytes)`.

    Args:
        codes: `(rows, columns)`, within the range of the format.
        scale: `(rows, columns / block)`.
    """
    rows = len(codes)
    blocks = form.pack(codes.reshape(-1, form.columns), scale.reshape(-1, 1))
    return blocks.reshape(rows, -1)
