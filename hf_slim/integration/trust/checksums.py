"""Checksums of `quantization_config` in config.json: an edited one makes other values of the same bytes.

They are written beside it as `hf_slim_checksums`, one for each of its keys, so that an error can name the keys that
were edited. They protect against mistakes: whoever means to deceive can write new ones.
"""

import hashlib
import json
from typing import Any

from hf_slim.core.errors import SlimLoadError
from hf_slim.core.files.json_file import shown

KEY = "hf_slim_checksums"  # in config.json
HEX_DIGITS = 16


def checksums(settings: dict[str, Any]) -> dict[str, str]:
    """The checksum of every value of a mapping, by its key: the same for the same JSON, in whatever order.

    Args:
        settings: `quantization_config` as JSON types.
    """
    return {name: _checksum(value) for name, value in sorted(settings.items())}


def check_checksums(settings: dict[str, Any], written: object) -> None:
    """Compares `quantization_config` with the checksums of when it was written.

    Args:
        settings: What config.json says now.
        written: What it says under `KEY`; None: nothing, as before hf_slim 0.3, or where an edit is meant.
    Raises: SlimLoadError: naming the keys that differ.
    """
    if written is None:
        return
    if not isinstance(written, dict):
        raise SlimLoadError(f"`{KEY}` in config.json must be a mapping, got {shown(written)}. {_what_to_do()}")
    now = checksums(settings)
    edited = [name for name in sorted({*now, *map(str, written)}) if now.get(name) != written.get(name)]
    if edited:
        differing = "; ".join(f"`{name}` is {shown(settings.get(name))}" for name in edited[:3])
        raise SlimLoadError(
            f"`quantization_config` in config.json is not what hf_slim wrote: {differing}, and was something else. "
            f"The weights would get other values. {_what_to_do()}"
        )


def _checksum(value: Any) -> str:
    content = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(content).hexdigest()[:HEX_DIGITS]


def _what_to_do() -> str:
    return f"Fetch or make the folder again; if you mean the edit, remove `{KEY}` from config.json."
