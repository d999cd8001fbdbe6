"""Reading a stored teacher: the most probable classes for every training example, looked up by its content.

A store is a folder of safetensors shards and the manifest `teacher.json`, which is written last. A shard contains
`keys` `(examples,)` and `offsets` `(examples + 1,)`, both int64, and for every prediction its classes `ids`
`(predictions, k)` and their `log_probabilities` `(predictions, k)` in fp16, most probable first. `tail_mass`, the
probability of all other classes, is not stored. The manifest calls the number of predictions `n_answers`. `writer.py`
writes a store.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hf_slim.core.errors import SlimConfigError, SlimDataError, SlimLoadError
from hf_slim.distillation.store.check import STORE_AGAIN, check_predictions, info_from, read_manifest
from hf_slim.distillation.store.format import MANIFEST, NO_MASS, batch_keys, row_key
from hf_slim.distillation.store.index import ShardIndex, read_index

CHECKED_ROWS = 10_000  # rows of a dataset that are looked up before training: a few seconds


class StoredTeacher:
    """A finished store, opened for reading. Predictions are memory-mapped; only the index is in memory.

    Args:
        folder: Folder of the store. Call `open`, which checks it.
        manifest: Contents of `teacher.json`.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.info = info_from(manifest, folder / MANIFEST)
        self._files: dict[int, Any] = {}  # opened on first use
        shards = [self._index(shard) for shard in manifest["shards"]]
        keys = torch.cat([index.keys for index in shards])
        self._keys, order = keys.sort(stable=True)
        self._shards = torch.cat([torch.full_like(index.keys, i) for i, index in enumerate(shards)])[order]
        self._starts = torch.cat([index.offsets[:-1] for index in shards])[order]
        self._ends = torch.cat([index.offsets[1:] for index in shards])[order]

    @classmethod
    def open(cls, folder: str | Path) -> "StoredTeacher":
        """Open the store in a folder.

        Args:
            folder: Written by `StoredTeacherWriter` and `finish_store`.
        Raises: SlimError: if the store is unfinished, damaged, or of another version.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            if is_stored_teacher(folder):
                raise SlimLoadError(
                    f"The stored teacher in '{folder}' is unfinished: it has shards, but no {MANIFEST}. Run "
                    "`hf-slim cache-teacher` with --resume to finish it."
                )
            raise SlimLoadError(f"'{folder}' contains no stored teacher: it has no {MANIFEST}. {STORE_AGAIN}")
        manifest = read_manifest(folder)
        return cls(folder, manifest)

    def check(self, n_classes: int, tokenizer_hash: str | None = None, temperature: float | None = None) -> None:
        """Check that the stored predictions fit a student.

        Args:
            n_classes: Size of the student's vocabulary or label set.
            tokenizer_hash: Hash of the student's tokenizer; None: not compared.
            temperature: Temperature of the loss; None: not compared.
        Raises: SlimError: if one of them differs from that of the store.
        """
        where = f"The stored teacher in '{self.folder}'"
        if n_classes != self.info.n_classes:
            raise SlimLoadError(
                f"{where} has {self.info.n_classes} classes and the student has {n_classes}. Both must have the same "
                f"vocabulary or label set. {STORE_AGAIN}"
            )
        if tokenizer_hash is not None and tokenizer_hash != self.info.tokenizer_hash:
            raise SlimLoadError(
                f"{where} was made with another tokenizer: its vocabulary or special tokens differ. {STORE_AGAIN}"
            )
        if temperature is not None and temperature != self.info.temperature:
            raise SlimConfigError(
                f"{where} was made with temperature {self.info.temperature}, but the loss has {temperature}. Set "
                f"`temperature` to {self.info.temperature}. Or: {STORE_AGAIN}"
            )

    def check_data(self, dataset: Sequence[Mapping[str, Any]]) -> int:
        """Look rows up and return how many: all, or 10,000 spread evenly over a larger dataset.

        Args:
            dataset: Rows with `input_ids` and optionally `attention_mask`, as lists or tensors.
        Raises: SlimError: at the first row that is not in the store.
        """
        count = min(len(dataset), CHECKED_ROWS)
        for number in range(count):
            index = number * len(dataset) // count
            key, length = row_key(dataset[index])
            self._locate([key], [length], f"Row {index} of the training data")
        return count

    def top_k(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Most probable classes of the teacher and their log-probabilities, on the device of the inputs.

        Args:
            inputs: `input_ids` `(batch, length)` and optionally `attention_mask` of the same shape; other entries are
                ignored.
        Returns: `ids` int64 and `log_probabilities` float32, both `(batch * length, k)` in the order of
            `input_ids.flatten()`; a row of padding gives class 0 the probability 1. `(batch, k)` if every example has
            one prediction. The ids of a row are distinct.
        Raises: SlimError: if an example is not in the store.
        """
        keys, real = batch_keys(inputs)
        device = inputs["input_ids"].device
        found = self._locate(keys, real.sum(1).tolist(), "Example {} of this batch")
        slices = [self._read(*place) for place in found]
        ids = torch.cat([ids for ids, _ in slices]).to(device).long()
        log_probabilities = torch.cat([values for _, values in slices]).to(device).float()
        if self.info.per == "example" or real.all():
            return ids, log_probabilities
        real = real.flatten().to(device)
        all_ids = torch.arange(self.info.k, device=device).repeat(len(real), 1)
        all_values = log_probabilities.new_full(all_ids.shape, NO_MASS)
        all_values[:, 0] = 0
        all_ids[real], all_values[real] = ids, log_probabilities
        return all_ids, all_values

    def _locate(self, keys: list[int], lengths: list[int], what: str) -> list[tuple[int, int, int]]:
        """Shard, first prediction and end of every example; `what` describes an example that is not stored."""
        wanted = torch.tensor(keys, dtype=torch.int64)
        places = torch.searchsorted(self._keys, wanted).clamp_(max=len(self._keys) - 1)
        expected = torch.tensor(lengths) if self.info.per == "token" else torch.ones(len(keys), dtype=torch.int64)
        starts, ends = self._starts[places], self._ends[places]
        for number in ((self._keys[places] != wanted) | (ends - starts != expected)).nonzero().flatten().tolist():
            raise SlimDataError(
                f"{what.format(number)}, {lengths[number]} tokens long, is not among the "
                f"{self.manifest['n_examples']} examples stored in '{self.folder}'. {STORE_AGAIN} If the collator "
                "changes tokens at random, name a model as the teacher: such examples cannot be stored."
            )
        return list(zip(self._shards[places].tolist(), starts.tolist(), ends.tolist(), strict=True))

    def _index(self, shard: dict[str, Any]) -> ShardIndex:
        """The index of a shard. Raises SlimLoadError if it is not the one that the manifest lists."""
        path = self.folder / shard["file"]
        index = read_index(path)
        if index.info != self.info or (len(index.keys), int(index.offsets[-1])) != (
            shard["n_examples"],
            shard["n_answers"],
        ):
            raise SlimLoadError(
                f"The shard '{path}' is of another stored teacher than the {MANIFEST} beside it. Copy both again. Or: "
                f"{STORE_AGAIN}"
            )
        return index

    def _read(self, shard: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        path = self.folder / self.manifest["shards"][shard]["file"]
        if shard not in self._files:
            self._files[shard] = safe_open(path, "pt")
        file = self._files[shard]
        ids, log_probabilities = file.get_slice("ids")[start:end], file.get_slice("log_probabilities")[start:end]
        check_predictions(ids, log_probabilities, self.info.n_classes, path)
        return ids, log_probabilities


def is_stored_teacher(folder: str | Path) -> bool:
    """Whether a folder contains a store, finished or not.

    Args:
        folder: A path, or a name that may be one; a Hub id gives False.
    """
    folder = Path(folder)
    return (folder / MANIFEST).is_file() or any(folder.glob("shard-*-*.safetensors"))
