"""The manifest of a finished folder: size and SHA-256 of every file that a model is loaded from.

`hf_slim.json` lists them. Documents may be edited afterwards and are not listed: README.md and other Markdown,
reports, pictures, licences, and hidden files. Any other file must be listed, since a loader might read it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_slim.core.errors import SlimLoadError
from hf_slim.core.files.durable import sha256
from hf_slim.core.files.json_file import AGAIN, read_object, shown
from hf_slim.core.files.places import file_in
from hf_slim.core.report import write_atomically
from hf_slim.version import __version__

MANIFEST, FORMAT = "hf_slim.json", 1
MOST_BYTES = 16 * 2**20
DOCUMENTS = ("report.", "license", "notice")  # what their names start with
DOCUMENT_SUFFIXES = (".md", ".png", ".jpg", ".jpeg", ".svg", ".log")
NAMED = 5  # differences that a message names


@dataclass(frozen=True)
class Manifest:
    """What a folder held when it was finished.

    Attributes:
        version: Of the hf_slim that wrote it.
        files: Path inside the folder, with `/` -> (size in bytes, SHA-256 in hexadecimal digits).
    """

    version: str
    files: dict[str, tuple[int, str]]


def write_manifest(folder: Path) -> Manifest:
    """Records what the folder holds now.

    Raises: SlimLoadError: for a link that leads outside of the folder.
    """
    found = Manifest(__version__, {name: _recorded(file_in(folder, name, folders=True)) for name in listed(folder)})
    files = {name: {"size": size, "sha256": digest} for name, (size, digest) in found.files.items()}
    content = json.dumps({"format": FORMAT, "hf_slim": __version__, "files": files}, indent=2) + "\n"
    write_atomically(folder / MANIFEST, lambda path: _write(path, content))
    return found


def read_manifest(folder: Path) -> Manifest:
    """What was recorded. Raises SlimLoadError if nothing was, or the manifest is damaged or of a newer format."""
    if not (folder / MANIFEST).exists():
        raise SlimLoadError(
            f"'{folder}' has no {MANIFEST}, which hf_slim writes with every folder that it finishes; what "
            "`save_pretrained` or the Trainer wrote has none. Record the folder as it is now with `hf-slim verify "
            "--record`, if you trust it."
        )
    content = read_object(file_in(folder, MANIFEST), MOST_BYTES)
    number, version, files = content.get("format"), content.get("hf_slim"), content.get("files")
    if type(number) is int and number > FORMAT:
        raise SlimLoadError(
            f"'{folder / MANIFEST}' has format {number}, written by hf_slim {shown(version)}; hf_slim {__version__} "
            f"reads format {FORMAT}. Install a newer hf_slim."
        )
    if number != FORMAT or type(number) is not int or not isinstance(version, str) or not isinstance(files, dict):
        raise SlimLoadError(f"'{folder / MANIFEST}' is damaged: it holds {shown(content)}. {AGAIN}")
    return Manifest(version, {name: _entry(folder, name, entry) for name, entry in files.items()})


def differences(folder: Path, manifest: Manifest) -> list[str]:
    """What differs between a folder and its manifest, one phrase each; sizes are compared before any file is read.

    Raises: SlimLoadError: for a name that leads outside of the folder, or a file that is none.
    """
    here = set(listed(folder))
    found = [f"{shown(name)} is missing" for name in sorted(manifest.files.keys() - here)]
    found += [f"{shown(name)} was not there" for name in sorted(here - manifest.files.keys())]
    for name, (size, digest) in sorted(manifest.files.items()):
        if name not in here:
            continue
        path = file_in(folder, name, folders=True)
        if path.stat().st_size != size:
            found.append(f"{shown(name)} has {path.stat().st_size:,} bytes and had {size:,}")
        elif sha256(path) != digest:
            found.append(f"{shown(name)} has other content")
    return found


def require_same(folder: Path, manifest: Manifest) -> None:
    """Raises SlimLoadError that names what differs between a folder and its manifest."""
    found = differences(folder, manifest)
    if found:
        more = f", and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise SlimLoadError(
            f"'{folder}' is not what hf_slim {manifest.version} recorded in {MANIFEST}: {', '.join(found[:NAMED])}"
            f"{more}. Fetch or make it again; if you mean the changes, record them with `hf-slim verify --record`."
        )


def listed(folder: Path) -> list[str]:
    """Paths of the files that a manifest lists, sorted; see the module."""
    return sorted(path.relative_to(folder).as_posix() for path in _files(folder) if not _is_document(path))


def _files(folder: Path) -> Iterator[Path]:
    """Everything in a folder that is no folder itself; folders are not followed through links, hidden ones passed."""
    for path in folder.iterdir():
        if path.name.startswith(".") or path == folder / MANIFEST:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        else:
            yield path


def _is_document(path: Path) -> bool:
    name = path.name.lower()
    return name.startswith(DOCUMENTS) or name.endswith(DOCUMENT_SUFFIXES)


def _write(path: Path, content: str) -> None:
    path.write_text(content, "utf-8")


def _recorded(path: Path) -> tuple[int, str]:
    return path.stat().st_size, sha256(path)


def _entry(folder: Path, name: str, entry: Any) -> tuple[int, str]:
    size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(digest, str):
        raise SlimLoadError(
            f"'{folder / MANIFEST}' must give size and sha256 of {shown(name)}, got {shown(entry)}. {AGAIN}"
        )
    return size, digest
