"""The file format of a stored teacher: settings, shards, and the hashes by which examples are looked up."""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimConfigError, SlimDataError

MANIFEST, VERSION = "teacher.json", 1
MOST_CLASSES = 2**31 - 1  # ids are stored as int32
NO_MASS = -65504.0  # the lowest fp16 value instead of -inf: `exp` of it is 0 too, and 0 times it is 0, not NaN
NOT_TEXT = ("pixel_values", "input_features", "inputs_embeds", "decoder_input_ids")


@dataclass(frozen=True)
class StoreInfo:
    """Settings of a store. Shards can only be combined if these are equal.

    Attributes:
        k: Classes stored per prediction, at most `n_classes`.
        n_classes: Size of the teacher's vocabulary or label set.
        per: The unit of a prediction: "token" or "example".
        temperature: The number by which the teacher's logits were divided.
        dtype: Precision in which the teacher ran.
        tokenizer_hash: `tokenizer_hash` of the tokenizer that made the examples.
        teacher_hash: `model_hash` of the teacher.
        teacher: Name of the teacher, for information only.
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
        if type(self.n_classes) is not int or not 1 <= self.n_classes <= MOST_CLASSES:
            raise SlimConfigError(
                f"`n_classes` must be a whole number from 1 to {MOST_CLASSES}, got {self.n_classes!r}."
            )
        if type(self.k) is not int or not 1 <= self.k <= self.n_classes:
            raise SlimConfigError(
                f"`k` must be a whole number from 1 to the teacher's {self.n_classes} classes, got {self.k!r}."
            )
        if self.per not in ("token", "example"):
            raise SlimConfigError(f"`per` must be 'token' or 'example', got {self.per!r}.")
        is_number = type(self.temperature) in (int, float)
        if not is_number or not 0 < self.temperature < float("inf"):
            raise SlimConfigError(
                f"`temperature` must be a positive number, got {self.temperature!r}. Use 1 for none."
            )
        for name in ("dtype", "tokenizer_hash", "teacher_hash", "teacher"):
            if not isinstance(vars(self)[name], str):
                raise SlimConfigError(f"`{name}` must be a text, got {vars(self)[name]!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON types."""
        return asdict(self)

    @property
    def id_dtype(self) -> torch.dtype:
        """The smallest integer type that represents every class."""
        return torch.uint16 if self.n_classes <= 2**16 else torch.int32

    def check_same(self, other: "StoreInfo", where: str) -> None:
        """Check that shards with other settings can be combined with these.

        Args:
            other: Settings of the existing shards.
            where: Folder of the shards, for the message.
        Raises: SlimError: if a setting differs.
        """
        for name in (f.name for f in fields(self) if f.compare):
            mine, theirs = vars(self)[name], vars(other)[name]
            if mine != theirs:
                raise SlimConfigError(
                    f"The stored predictions in '{where}' were made with {name} {theirs!r}, but this run has "
                    f"{mine!r}. Resume with the same settings, or pass --overwrite to start again."
                )


def tail_mass(log_probabilities: Tensor) -> Tensor:
    """Probability of all classes that are not stored, `(rows,)`, at least 0.

    Args:
        log_probabilities: `(rows, k)`, of the stored classes.
    """
    return (1 - log_probabilities.float().exp().sum(-1)).clamp(min=0)


def row_key(row: Mapping[str, Any]) -> tuple[int, int]:
    """Hash of the tokens of one example, a signed 64-bit number, and the number of tokens; padding is not included.

    Args:
        row: Unbatched: `input_ids` `(length,)` and optionally `attention_mask`, as lists or tensors.
    """
    ids = row["input_ids"]
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if row.get("attention_mask") is not None:
        ids = [number for number, real in zip(ids, row["attention_mask"], strict=True) if real]
    digest = hashlib.blake2b(struct.pack(f"<{len(ids)}q", *ids), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True), len(ids)


def batch_keys(inputs: Mapping[str, Any]) -> tuple[list[int], Tensor]:
    """`row_key` of every example of a batch, and a mask of the real tokens, `(batch, length)` on the CPU.

    Args:
        inputs: Keyword arguments of the student.
    Raises: SlimError: if the inputs are not token ids with a mask of the same shape.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    other = [name for name in NOT_TEXT if inputs.get(name) is not None]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or other:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else None
        raise SlimDataError(
            f"A stored teacher needs `input_ids` of shape (batch, length) and no other inputs, got shape {shape} and "
            f"{other or 'nothing else'}. For other inputs, name a model as the teacher."
        )
    if mask is not None and mask.shape != ids.shape:
        raise SlimDataError(
            f"`attention_mask` has shape {tuple(mask.shape)} and `input_ids` {tuple(ids.shape)}. A stored teacher "
            "needs a mask of the same shape to find the padding: use a collator that pads, or name a model as the "
            "teacher."
        )
    real = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
    return [row_key({"input_ids": row[kept]})[0] for row, kept in zip(ids.cpu(), real, strict=True)], real


def data_fingerprint(keys: Iterable[int]) -> str:
    """Hash of a set of examples, 32 hexadecimal digits, independent of their order.

    Args:
        keys: `row_key` of every example; repeated ones change nothing.
    """
    unique = sorted(set(keys))
    return hashlib.blake2b(struct.pack(f"<{len(unique)}q", *unique), digest_size=16).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of the vocabulary and the special tokens, except the padding token, because padding is not stored.

    Args:
        tokenizer: Has `get_vocab()` and `special_tokens_map`.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    content = json.dumps([sorted(tokenizer.get_vocab().items()), sorted(special.items())])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def model_hash(model: nn.Module) -> str:
    """Hash of a model's class, weights and their dtypes, 32 hexadecimal digits; takes about a second per gigabyte."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
