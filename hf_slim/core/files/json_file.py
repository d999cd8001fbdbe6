"""JSON files from strangers: bounded in size, and refused where two programs could read them differently."""

import json
import reprlib
import stat
from pathlib import Path
from typing import Any

from hf_slim.core.errors import SlimLoadError

AGAIN = "Fetch or make it again."
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 4, 4, 80, 80


def shown(value: object) -> str:
    """A value as an error message shows it: at most a line, with everything that cannot be printed escaped."""
    return _SHORT.repr(value)


def file_size(path: Path) -> int:
    """Size of a regular file in bytes. Raises SlimLoadError for a missing one, a folder or a device."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise SlimLoadError(f"The file {shown(str(path))} cannot be read: {error}. {AGAIN}") from error
    if not stat.S_ISREG(status.st_mode):
        raise SlimLoadError(
            f"{shown(str(path))} is no regular file, but a folder, a device or a pipe. Only regular files are read. "
            f"{AGAIN}"
        )
    return status.st_size


def read_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        most_bytes: A larger file is refused unread.
    Raises: SlimLoadError: for anything but one object in UTF-8 whose keys are all different.
    """
    size = file_size(path)
    if size > most_bytes:
        raise SlimLoadError(f"'{path}' has {size:,} bytes; such a file has at most {most_bytes:,}. {AGAIN}")
    return parse_object(path.read_bytes(), str(path))


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`; see `read_object`.

    Args:
        where: Path of the file, for the message.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise SlimLoadError(f"'{where}' is not readable: {error}. It must be JSON in UTF-8. {AGAIN}") from error
    if not isinstance(value, dict):
        raise SlimLoadError(f"'{where}' must hold a JSON object, got {shown(value)}. {AGAIN}")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers of JSON disagree about which value a repeated key has: it could be checked as one, used as another."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {shown(repeated)} occurs twice")
    return found
