"""Writing a stored teacher shard by shard, so that an interrupted run can be resumed."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_slim.core.errors import SlimError
from hf_slim.core.files.durable import sha256
from hf_slim.core.report import write_atomically
from hf_slim.distillation.store.format import (
    MANIFEST,
    NO_MASS,
    VERSION,
    StoreInfo,
    batch_keys,
    data_fingerprint,
    tail_mass,
)
from hf_slim.distillation.store.index import ShardIndex, read_index

SHARD_BYTES = 256_000_000
FLUSH_SECONDS = 300.0  # the most work that a killed run loses, also if a shard takes an hour to fill
SHARD = re.compile(r"shard-(\d{1,9})-(\d{1,9})\.safetensors")  # rank and number
CHUNK_ROWS = 128  # rows that are converted to float32 at a time


class StoredTeacherWriter:
    """Adds predictions to an unfinished store; `finish_store` finishes it when all ranks are done.

    As a context manager it also writes what was added before an exception.

    Args:
        folder: Folder of the store, created if it does not exist.
        info: Settings of the store.
        rank: Index of the process. Every rank writes its own shards into the same folder.
        resume: Continue with the existing shards.

    Attributes:
        keys: `row_key` of every example that is stored or will be written with the next shard.
    Raises: SlimError: if the folder contains a finished store, shards without `resume`, or shards with other settings.
    """

    def __init__(self, folder: str | Path, info: StoreInfo, rank: int = 0, resume: bool = False):
        self.folder, self.info, self.rank = Path(folder), info, rank
        self.keys: set[int] = set()
        self._buffer: list[tuple[int, Tensor, Tensor]] = []
        self._bytes, self._flushed_at = 0, time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / MANIFEST).exists():
            raise SlimError(f"'{self.folder}' contains a finished store. Choose another folder, or pass --overwrite.")
        for stale in self.folder.glob(f".shard-{rank}-*"):
            stale.unlink()  # left by a run that was killed while it wrote
        own = shards_in(self.folder, rank)
        if own and not resume:
            raise SlimError(
                f"'{self.folder}' contains predictions of an interrupted run. Pass --resume to continue it, or "
                "--overwrite to start again."
            )
        self._next = 1 + max((_number(path) for path in own), default=-1)
        if resume:
            for index in _indices(self.folder, info).values():
                self.keys.update(index.keys.tolist())

    def add(self, inputs: Mapping[str, Any], logits: Tensor) -> int:
        """Add a batch and return the number of examples that were not in the store yet.

        Args:
            inputs: As for `StoredTeacher.top_k`.
            logits: `(batch, length, n_classes)`, or `(batch, n_classes)` for one prediction per example.
        Raises: SlimError: if the shapes do not fit each other or the store, or a logit is NaN.
        """
        keys, real = batch_keys(inputs)
        shape = (*real.shape, self.info.n_classes) if self.info.per == "token" else (len(real), self.info.n_classes)
        if logits.shape != shape:
            raise SlimError(
                f"The teacher's logits have shape {tuple(logits.shape)}, and this store needs {shape}: one prediction "
                f"per {self.info.per}. Encoder-decoder models cannot be stored."
            )
        new = 0
        for number, key in enumerate(keys):
            if key in self.keys:
                continue
            rows = logits[number][real[number].to(logits.device)] if self.info.per == "token" else logits[[number]]
            ids, log_probabilities = top_k_log_probabilities(rows, self.info.k, self.info.temperature)
            ids = ids.to(self.info.id_dtype).cpu()
            self._buffer.append((key, ids, log_probabilities.cpu()))
            self._bytes += ids.nbytes + log_probabilities.nbytes
            self.keys.add(key)
            new += 1
        # only between batches: a batch is stored completely or not at all, so a resumed run never computes a part
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()
        return new

    def flush(self) -> None:
        """Write what was added since the last shard as a new shard."""
        self._flushed_at = time.monotonic()
        if not self._buffer:
            return
        keys, ids, log_probabilities = zip(*self._buffer, strict=True)
        tensors = {
            "keys": torch.tensor(keys, dtype=torch.int64),
            "offsets": torch.tensor([0, *(len(one) for one in ids)]).cumsum(0),
            "ids": torch.cat(ids),
            "log_probabilities": torch.cat(log_probabilities),
        }
        mass = sum((1 - tail_mass(one)).sum().item() for one in log_probabilities)
        metadata = {"info": json.dumps(self.info.to_dict()), "mass_held": repr(mass)}
        path = self.folder / f"shard-{self.rank}-{self._next}.safetensors"
        write_atomically(path, lambda partial: save_file(tensors, partial, metadata))
        self._buffer, self._bytes, self._next = [], 0, self._next + 1

    def __enter__(self) -> "StoredTeacherWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.flush()


def finish_store(folder: str | Path, info: StoreInfo) -> dict[str, Any]:
    """Write the manifest, which turns a folder of shards into a store, and return it.

    Call it on one rank, after all ranks have flushed.

    Args:
        folder: Folder of the shards.
        info: Settings of the store.
    Raises: SlimError: if there are no shards, or one is damaged or was made with other settings.
    """
    folder = Path(folder)
    indices = _indices(folder, info)
    if not indices:
        raise SlimError(f"'{folder}' contains no shards. Add examples first.")
    keys = {key for index in indices.values() for key in index.keys.tolist()}
    shards = [
        {
            "file": path.name,
            "size_bytes": path.stat().st_size,
            "sha256": sha256(path),
            "n_examples": len(index.keys),
            "n_answers": int(index.offsets[-1]),
        }
        for path, index in indices.items()
    ]
    n_answers = sum(shard["n_answers"] for shard in shards)
    manifest = {
        "version": VERSION,
        **info.to_dict(),
        "data_fingerprint": data_fingerprint(keys),
        "n_examples": len(keys),
        "n_answers": n_answers,
        "mass_held": round(sum(index.mass_held for index in indices.values()) / n_answers, 6),
        "shards": shards,
    }
    write_atomically(folder / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8"))
    return manifest


@torch.no_grad()
def top_k_log_probabilities(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Most probable classes, `(rows, k)` int64, and their log-probabilities in fp16, most probable first.

    Args:
        logits: `(rows, n_classes)`, any float dtype; computed in float32.
        k: Number of classes.
        temperature: Positive; logits are divided by it.
    Raises: SlimError: if a log-probability is NaN.
    """
    chunks = []
    for chunk in logits.split(CHUNK_ROWS):
        values, ids = torch.log_softmax(chunk.float() / temperature, dim=-1).topk(k, dim=-1)
        chunks.append((ids, values.half().clamp_(min=NO_MASS)))
    ids, log_probabilities = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    if log_probabilities.isnan().any():
        raise SlimError(
            "The teacher's logits contain NaN or infinity. Check its checkpoint, or run it in a wider dtype than fp16."
        )
    return ids, log_probabilities


def shards_in(folder: Path, rank: int | None = None) -> list[Path]:
    """Complete shards in a folder, sorted by rank and number.

    Args:
        folder: Folder of the store.
        rank: Only the shards of this rank; None: of all.
    """
    found = {path: SHARD.fullmatch(path.name) for path in folder.glob("shard-*.safetensors")}
    numbers = {path: (int(match[1]), int(match[2])) for path, match in found.items() if match}
    return sorted((path for path in numbers if rank in (None, numbers[path][0])), key=lambda path: numbers[path])


def _number(path: Path) -> int:
    return int(path.stem.split("-")[2])


def _indices(folder: Path, info: StoreInfo) -> dict[Path, ShardIndex]:
    """Index of every shard; raises SlimError if one was made with other settings."""
    indices = {path: read_index(path) for path in shards_in(folder)}
    for index in indices.values():
        info.check_same(index.info, str(folder))
    return indices
