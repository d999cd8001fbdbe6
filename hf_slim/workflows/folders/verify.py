"""Comparing a folder with what was recorded when it was finished."""

from dataclasses import dataclass
from pathlib import Path

from hf_slim.core.errors import SlimLoadError
from hf_slim.core.files.model_folder import check_model_folder, read_config, refuse_pickles
from hf_slim.distillation.store.check import changed_shards
from hf_slim.distillation.store.reader import StoredTeacher, is_stored_teacher
from hf_slim.integration.trust.checksums import KEY, check_checksums
from hf_slim.integration.trust.manifest import read_manifest, require_same, write_manifest


@dataclass(frozen=True)
class Verified:
    """A folder that is what was recorded.

    Attributes:
        folder: Its path.
        files: How many files were compared.
        size_bytes: Of these files together.
        version: Of the hf_slim that recorded them; "" for a stored teacher, whose manifest does not say.
    """

    folder: str
    files: int
    size_bytes: int
    version: str


def verify(folder: str | Path, record: bool = False) -> Verified:
    """Compares size and SHA-256 of every file of a finished folder with its manifest: `hf-slim verify`.

    README.md and other Markdown, reports, pictures, licences and hidden files are not compared. Reads all files once,
    about a second per gigabyte, and writes nothing without `record`.

    Args:
        folder: A model that hf_slim finished, or a stored teacher.
        record: Record the folder as it is now, in place of an older manifest, once its structure was checked.
    Raises: SlimLoadError: naming what differs; or if the folder has no manifest, is damaged, or leads outside of
        itself.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SlimLoadError(f"'{folder}' is no folder. Name a folder with a model, or with a stored teacher.")
    if is_stored_teacher(folder):
        return _verified_store(folder)
    if record:
        _check_structure(folder)
        manifest = write_manifest(folder)
    else:
        manifest = read_manifest(folder)
        require_same(folder, manifest)
        _check_structure(folder)
    size = sum(size for size, _ in manifest.files.values())
    return Verified(str(folder), len(manifest.files), size, manifest.version)


def _check_structure(folder: Path) -> None:
    if check_model_folder(folder) is None:
        refuse_pickles(folder)
    config = read_config(folder)
    settings = config.get("quantization_config")
    if isinstance(settings, dict):
        check_checksums(settings, config.get(KEY))


def _verified_store(folder: Path) -> Verified:
    shards = (manifest := StoredTeacher.open(folder).manifest)["shards"]
    if found := changed_shards(folder, manifest):
        raise SlimLoadError(
            f"The stored teacher in '{folder}' is not what was written: {', '.join(found[:5])}. Copy it again, or run "
            "`hf-slim cache-teacher` again."
        )
    return Verified(str(folder), len(shards), sum(shard["size_bytes"] for shard in shards), "")
