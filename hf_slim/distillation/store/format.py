"""What a stored teacher's files mean: settings, shards, and the hashes by which examples are found again."""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hf_slim.core.errors import SlimConfigError, SlimDataError, SlimLoadError

MANIFEST, VERSION = "teacher.json", 1
NO_MASS = -65504.0  # the smallest fp16: `exp` of it is 0, and 0 times it is 0 where 0 times -inf is not
NOT_TEXT = ("pixel_values", "input_features", "inputs_embeds", "decoder_input_ids")


@dataclass(frozen=True)
class StoreInfo:
    """What a store's numbers mean; two stores that are equal in this can be one.

    Attributes:
        k: Classes held of every answer, at most `n_classes`.
        n_classes: Classes that the teacher chooses among.
        per: What has one answer: "token" or "example".
        temperature: By which the teacher's logits were divided.
        dtype: What the teacher computed in.
        tokenizer_hash: `tokenizer_hash` of the tokenizer that made the examples.
        teacher_hash: `model_hash` of the teacher.
        teacher: Its name, for people.
    """

    k: int
    n_classes: int
    per: str
    temperature: float
    dtype: str
    tokenizer_hash: str
    teacher_hash: str
    teacher: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or not 1 <= self.k <= self.n_classes:
            raise SlimConfigError(
                f"`k` must be a whole number of classes from 1 to the teacher's {self.n_classes}, got {self.k!r}."
            )
        if self.per not in ("token", "example"):
            raise SlimConfigError(f"`per` must be 'token' or 'example', got {self.per!r}.")
        if not 0 < self.temperature < float("inf"):
            raise SlimConfigError(
                f"`temperature` must be a positive number, got {self.temperature!r}. Use 1 for none."
            )

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON types."""
        return asdict(self)

    @property
    def id_dtype(self) -> torch.dtype:
        """The smallest type that holds every class."""
        return torch.uint16 if self.n_classes <= 2**16 else torch.int32

    def check_same(self, other: "StoreInfo", where: str) -> None:
        """Raises SlimError if `other`, which lies at `where`, cannot be continued with these settings."""
        for name in (f.name for f in fields(self) if f.compare):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise SlimConfigError(
                    f"The stored answers in '{where}' were made with {name} {theirs!r}, and this run asks for "
                    f"{mine!r}. Resume with the same settings, or pass --overwrite to start afresh."
                )


def tail_mass(log_probabilities: Tensor) -> Tensor:
    """The probability of all classes that are not held, `(rows,)`: 1 less the held ones, at least 0."""
    return (1 - log_probabilities.float().exp().sum(-1)).clamp(min=0)


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds, without its answers; shapes as in the file."""

    keys: Tensor
    offsets: Tensor
    info: StoreInfo
    mass_held: float  # summed over answers


def read_index(path: Path) -> ShardIndex:
    """The index of a shard. Raises SlimError if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:  # compares the header with the length of the file
            metadata = file.metadata()
            info = StoreInfo(**json.loads(metadata["info"]))
            keys, offsets = file.get_tensor("keys").clone(), file.get_tensor("offsets").clone()
            return ShardIndex(keys, offsets, info, float(metadata["mass_held"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise SlimLoadError(
            f"The shard '{path}' of a stored teacher is damaged: {error}. Copy it again, or delete it and run "
            "`hf-slim cache-teacher` again."
        ) from error


def row_key(row: Mapping[str, Any]) -> tuple[int, int]:
    """A 64-bit number that stands for the tokens of one unbatched example, padding left out, and how many they are."""
    ids = row["input_ids"]
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if row.get("attention_mask") is not None:
        ids = [number for number, real in zip(ids, row["attention_mask"], strict=True) if real]
    digest = hashlib.blake2b(struct.pack(f"<{len(ids)}q", *ids), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True), len(ids)


def batch_keys(inputs: Mapping[str, Any]) -> tuple[list[int], Tensor]:
    """`row_key` of every example of a batch, and which positions are no padding, `(batch, length)` on the CPU."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    other = [name for name in NOT_TEXT if inputs.get(name) is not None]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or other:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else None
        raise SlimDataError(
            f"A stored teacher answers `input_ids` of shape (batch, length) alone, got {shape} and "
            f"{other or 'no more'}. For other inputs keep the teacher in memory."
        )
    if mask is not None and mask.shape != ids.shape:
        raise SlimDataError(
            f"`attention_mask` has shape {tuple(mask.shape)} and `input_ids` {tuple(ids.shape)}. A stored teacher "
            "tells padding by a mask of the same shape: use a collator that pads, or keep the teacher in memory."
        )
    real = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
    return [row_key({"input_ids": row[kept]})[0] for row, kept in zip(ids.cpu(), real, strict=True)], real


def data_fingerprint(keys: Iterable[int]) -> str:
    """A hash of a set of examples, whatever their order."""
    unique = sorted(set(keys))
    return hashlib.blake2b(struct.pack(f"<{len(unique)}q", *unique), digest_size=16).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of the vocabulary and special tokens; the padding token does not count, as padding does not.

    Args:
        tokenizer: Has `get_vocab()` and `special_tokens_map`.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    content = json.dumps([sorted(tokenizer.get_vocab().items()), sorted(special.items())])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def model_hash(model: nn.Module) -> str:
    """A hash of a model's class and weights, in their dtypes; about a second per gigabyte."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
