"""Names of files that strangers give: they may only lead to regular files inside the folder they stand in."""

from pathlib import Path, PurePosixPath, PureWindowsPath

from hf_slim.core.errors import SlimLoadError
from hf_slim.core.files.json_file import AGAIN, file_size, shown

MOST_BYTES = 255  # of a file name, in most file systems


def is_plain_name(name: object) -> bool:
    """Whether this is the name of a file, without a folder, a drive or anything that a path could mean."""
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable():
        return False
    if len(name.encode()) > MOST_BYTES:
        return False
    return PurePosixPath(name).name == name and PureWindowsPath(name).name == name


def file_in(folder: Path, name: object, folders: bool = False) -> Path:
    """The path of a regular file of a folder.

    A link is followed if it stays in the folder, or leads to the blobs of the same repository in the cache of the Hub.

    Args:
        name: As a file from a stranger gives it.
        folders: Whether the name may have folders in front, separated by `/`.
    Raises: SlimLoadError: for any other name, for a link that leads outside, and for what is no regular file.
    """
    parts = name.split("/") if folders and isinstance(name, str) else [name]
    if not all(is_plain_name(part) for part in parts):
        raise SlimLoadError(
            f"In the folder '{folder}' a file is called {shown(name)}. Allowed is the name of a file inside this "
            f"folder{'' if folders else ', without a path'}. Somebody may have changed the folder to read other "
            "files: fetch it again from a source that you trust."
        )
    path = folder.joinpath(*map(str, parts))
    try:
        home, real = folder.resolve(), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise SlimLoadError(f"The file {shown(name)} is missing in '{folder}': {error}. {AGAIN}") from error
    if not real.is_relative_to(home) and real.parent != _hub_blobs(home):
        raise SlimLoadError(
            f"{shown(name)} in '{folder}' is a link to '{real}', outside of the folder. Put a copy of the file in its "
            "place if you trust it."
        )
    file_size(real)
    return path


def _hub_blobs(folder: Path) -> Path | None:
    """Where the cache of the Hub keeps the files of a snapshot, which itself holds links alone."""
    return next((parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"), None)
