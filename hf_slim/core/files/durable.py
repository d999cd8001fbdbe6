"""Files that survive a crash of the machine once they are in their place, with the access that new files get here."""

import hashlib
import os
import uuid
from pathlib import Path


def settle(folder: Path) -> None:
    """Gives a folder and everything in it the usual access, and waits until all of it is on the disk.

    Libraries write weights that only their owner may read, and a file that is moved before it is on the disk can be
    empty after a power failure.
    """
    mode = usual_mode(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            settle_file(path, mode)
        elif path.is_dir() and not path.is_symlink():
            path.chmod(_of_folder(mode))
            sync(path)
    folder.chmod(_of_folder(mode))
    sync(folder)


def settle_file(path: Path, mode: int) -> None:
    """Gives a file this access, and waits until it is on the disk."""
    path.chmod(mode)
    sync(path)


def sync(path: Path) -> None:
    """Waits until a file, or the list of files of a folder, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders, and writes them by itself
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits; about a second per gigabyte."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def usual_mode(folder: Path) -> int:
    """The access that a new file in this folder gets: 0o644 for most users; it follows their umask."""
    probe = folder / f".{uuid.uuid4().hex}"
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)
        probe.unlink()


def _of_folder(mode: int) -> int:
    """Whoever may read files may also enter folders."""
    return mode | (mode & 0o444) >> 2
