"""What a safetensors file says it holds: read without its data, and checked against the size of the file.

A file is 8 bytes of header length (little-endian), a JSON header that gives dtype, shape and place of every tensor,
and the data of all tensors without gaps. Source: https://huggingface.co/docs/safetensors, "Format".
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hf_slim.core.errors import SlimLoadError
from hf_slim.core.files.json_file import AGAIN, file_size, parse_object, shown

MOST_HEADER_BYTES = 16 * 2**20  # about 100,000 tensors; as Python objects a header takes some ten times its bytes
MOST_DIMENSIONS = 64  # what torch allows
LARGEST = 2**63 - 1
LENGTH_BYTES = 8
METADATA = "__metadata__"
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        dtype: As safetensors calls it, such as "BF16".
        shape: Its sizes, each at least 0.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many values it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file holds.

    Attributes:
        tensors: By name.
        metadata: Texts beside them, such as `{"format": "pt"}`.
        size_bytes: Of the file.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    size_bytes: int


def read_header(path: Path) -> Header:
    """What a safetensors file holds; none of its data is read.

    Raises: SlimLoadError: where header and file contradict each other or the format.
    """
    size = file_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MOST_HEADER_BYTES):
            _refuse(
                str(path),
                f"it has {size:,} bytes and says that its header has {length:,}; a header fits into the file and has "
                f"at most {MOST_HEADER_BYTES:,}",
            )
        raw = file.read(length)
    return parse_header(raw, size - LENGTH_BYTES - length, str(path))


def parse_header(raw: bytes, data_bytes: int, where: str) -> Header:
    """What a header says; see `read_header`.

    Args:
        raw: The header, without the 8 bytes of its length.
        data_bytes: Bytes of the file that follow.
        where: Path of the file, for the message.
    """
    if raw[:1] != b"{":
        _refuse(where, f"its header starts with {shown(raw[:8])} and must be a JSON object")
    entries = parse_object(raw, where)
    metadata = entries.pop(METADATA, {})
    texts = [*metadata.keys(), *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        _refuse(where, f"its metadata must be texts by name, got {shown(metadata)}")
    tensors: dict[str, StoredTensor] = {}
    places = []
    for name, entry in entries.items():
        tensors[name], place = _tensor(name, entry, where)
        places.append((place, name))
    end = 0
    for (start, stop), name in sorted(places):
        if start != end:
            _refuse(
                where,
                f"the tensor {shown(name)} starts at byte {start:,} of the data and must start at {end:,}, where the "
                "tensor before it ends",
            )
        end = stop
    if end != data_bytes:
        _refuse(where, f"its tensors take {end:,} bytes and the file holds {data_bytes:,} bytes of data")
    return Header(tensors, metadata, LENGTH_BYTES + len(raw) + data_bytes)


def _tensor(name: str, entry: Any, where: str) -> tuple[StoredTensor, tuple[int, int]]:
    """A tensor, and where its data starts and ends."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(where, f"the tensor {shown(name)} must have dtype, shape and data_offsets, got {shown(entry)}")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        _refuse(where, f"the tensor {shown(name)} has dtype {shown(dtype)}; known are {', '.join(BITS)}")
    if not _are_sizes(shape) or len(shape) > MOST_DIMENSIONS or math.prod(shape) > LARGEST:
        _refuse(where, f"the tensor {shown(name)} has shape {shown(shape)}; a shape is a list of sizes from 0")
    if not _are_sizes(place) or len(place) != 2 or place[0] > place[1]:
        _refuse(where, f"the tensor {shown(name)} has data_offsets {shown(place)}; it needs a start and an end")
    tensor = StoredTensor(dtype, tuple(shape))
    bits = tensor.numel * BITS[dtype]
    if bits != 8 * (place[1] - place[0]):
        _refuse(
            where,
            f"the tensor {shown(name)} of dtype {dtype} and shape {shown(shape)} takes {bits / 8:,.0f} bytes and has "
            f"{place[1] - place[0]:,}",
        )
    return tensor, (place[0], place[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= LARGEST for size in value)


def _refuse(where: str, why: str) -> NoReturn:
    raise SlimLoadError(f"'{where}' is no complete safetensors file: {why}. {AGAIN}")
