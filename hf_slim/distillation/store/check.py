"""Stored teachers from strangers: manifest and shards are checked before anything is allocated for them."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from hf_slim.core.errors import SlimConfigError, SlimLoadError
from hf_slim.core.files.durable import sha256
from hf_slim.core.files.header import Header
from hf_slim.core.files.json_file import parse_object, read_object, shown
from hf_slim.core.files.places import file_in, is_plain_name
from hf_slim.distillation.store.format import MANIFEST, NO_MASS, VERSION, StoreInfo

MOST_MANIFEST_BYTES = 16 * 2**20
NUMBERS = ("n_examples", "n_answers")
STORE_AGAIN = (
    "Run `hf-slim cache-teacher` again with the recipe, tokenizer, data and number of processes of the training."
)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store, whose shards are there in the sizes that it says.

    Raises: SlimLoadError: if the manifest is damaged, of another version, or names a file outside of the folder.
    """
    manifest = read_object(file_in(folder, MANIFEST), MOST_MANIFEST_BYTES)
    missing = {f.name for f in fields(StoreInfo)} | {"version", "shards", *NUMBERS}
    missing -= manifest.keys()
    if missing or manifest["version"] != VERSION:
        raise SlimLoadError(
            f"'{folder / MANIFEST}' is of version {shown(manifest.get('version'))} and lacks {sorted(missing)}; this "
            f"hf_slim reads version {VERSION}. {STORE_AGAIN}"
        )
    _check_numbers(folder / MANIFEST, manifest, NUMBERS)
    shards = manifest["shards"]
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        _refuse(folder / MANIFEST, f"`shards` must be a list of mappings, got {shown(shards)}")
    for shard in shards:
        _check_numbers(folder / MANIFEST, shard, ("size_bytes", *NUMBERS))
    names = [shown(shard.get("file")) for shard in shards]
    if len(set(names)) < len(names):
        _refuse(folder / MANIFEST, "it names a shard twice")
    _check_files(folder, shards)
    return manifest


def info_from(values: dict[str, Any], where: Path) -> StoreInfo:
    """The settings that a manifest or a shard gives. Raises SlimLoadError if one is missing or not allowed."""
    names = {f.name for f in fields(StoreInfo)}
    if missing := names - values.keys() - {"teacher"}:
        _refuse(where, f"it lacks {', '.join(sorted(missing))}")
    try:
        return StoreInfo(**{name: value for name, value in values.items() if name in names})
    except SlimConfigError as error:
        _refuse(where, str(error), error)


def described(header: Header, where: Path) -> tuple[StoreInfo, float]:
    """Settings of a shard and the mass that it holds, from its metadata, once its tensors were compared with them."""
    text = header.metadata.get("info", "")
    info = info_from(parse_object(text.encode("utf-8", "replace"), str(where)), where)
    sizes = {name: tensor.shape for name, tensor in header.tensors.items()}
    n_examples, n_answers = ((sizes.get(name) or (0,))[0] for name in ("keys", "ids"))
    wanted = {
        "keys": ("I64", (n_examples,)),
        "offsets": ("I64", (n_examples + 1,)),
        "ids": ("U16" if info.id_dtype.itemsize == 2 else "I32", (n_answers, info.k)),
        "log_probabilities": ("F16", (n_answers, info.k)),
    }
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()}
    if found != wanted:
        _refuse(where, f"it holds {shown(found)}, and its settings need {shown(wanted)}")
    try:
        mass = float(header.metadata.get("mass_held", ""))
    except ValueError as error:
        _refuse(where, str(error), error)
    if not math.isfinite(mass):
        _refuse(where, f"`mass_held` is {mass}")
    return info, mass


def check_offsets(offsets: Tensor, n_answers: int, where: Path) -> None:
    """Raises SlimLoadError unless offsets rise from 0 to the number of predictions.

    Args:
        offsets: `(examples + 1,)`, int64.
    """
    rising = bool((offsets[1:] >= offsets[:-1]).all())
    if not rising or offsets[0] != 0 or offsets[-1] != n_answers:
        _refuse(where, f"its offsets must rise from 0 to {n_answers:,}, the number of its predictions")


def check_predictions(ids: Tensor, log_probabilities: Tensor, n_classes: int, where: Path) -> None:
    """Raises SlimLoadError for classes that the teacher does not have, and for what is no log-probability.

    Args:
        ids: `(rows, k)`, uint16 or int32.
        log_probabilities: `(rows, k)`, fp16.
    """
    if not ids.numel():
        return
    classes = ids.int()
    if classes.min() < 0 or classes.max() >= n_classes:
        _refuse(where, f"it names the class {int(classes.max())}, and the teacher has {n_classes:,}")
    if not ((log_probabilities <= 0) & (log_probabilities >= NO_MASS)).all():
        _refuse(where, f"it holds log-probabilities outside of [{NO_MASS}, 0]")


def changed_shards(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Shards whose content is not what it was when the store was finished, one phrase each.

    Stores from before hf_slim 0.3 recorded no SHA-256; of those only sizes are known, which `read_manifest` compares.
    """
    recorded = [(shard["file"], shard["sha256"]) for shard in manifest["shards"] if "sha256" in shard]
    return [f"{name} has other content" for name, digest in recorded if sha256(file_in(folder, name)) != digest]


def _check_numbers(where: Path, values: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if type(values.get(name)) is not int or values[name] < 0:
            _refuse(where, f"`{name}` must be a whole number from 0, got {shown(values.get(name))}")


def _check_files(folder: Path, shards: list[dict[str, Any]]) -> None:
    faults = [] if shards else ["no shards are listed"]
    for shard in shards:
        name: Any = shard.get("file")
        if is_plain_name(name) and not (folder / name).exists():
            faults.append(f"{name} is missing")
            continue
        size = file_in(folder, name).stat().st_size
        if size != shard["size_bytes"]:
            faults.append(f"{name} has {size} of {shard['size_bytes']} bytes")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise SlimLoadError(
            f"The stored teacher in '{folder}' is not complete: {', '.join(faults[:3])}{more}. Copy it again. "
            f"Or: {STORE_AGAIN}"
        )


def _refuse(where: Path, why: str, cause: Exception | None = None) -> NoReturn:
    raise SlimLoadError(
        f"'{where}' of a stored teacher is damaged: {why}. Copy it again, or delete it and run "
        "`hf-slim cache-teacher` again."
    ) from cause
