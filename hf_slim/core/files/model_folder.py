"""A folder with a model from a stranger: its config, index and shards, checked before any of it is loaded."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_slim.core.errors import SlimLoadError
from hf_slim.core.files.header import StoredTensor, read_header
from hf_slim.core.files.json_file import AGAIN, read_object, shown
from hf_slim.core.files.places import file_in, is_plain_name

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MOST_CONFIG_BYTES, MOST_INDEX_BYTES = 16 * 2**20, 64 * 2**20
MOST_LAYERS, MOST_COUNTED = 512, 4096  # layers, and heads, experts ... of a model, whatever its files hold
MOST_LABELS = 2**17  # of a config without weights
_LAYERS = re.compile(r"(?:^|_)(?:layers?|blocks?|stages|depths?)$")  # each takes time and memory to build
_COUNTED = re.compile(r"(?:^|_)(?:labels|experts?|heads?|groups)$")
_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


@dataclass(frozen=True)
class Weights:
    """What the safetensors files of a model hold.

    Attributes:
        files: Their paths.
        tensors: All of their tensors, by name; each is in exactly one file.
        size_bytes: Of all files together.
    """

    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    size_bytes: int

    @property
    def numel(self) -> int:
        """How many values all tensors hold."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def largest_size(self) -> int:
        """The largest size of any tensor."""
        return max((size for tensor in self.tensors.values() for size in tensor.shape), default=0)


def check_model_folder(folder: Path) -> Weights | None:
    """What the weights of a folder are; only headers are read.

    Returns: None if the folder has no weights in safetensors.
    Raises: SlimLoadError: where config.json, the index or a shard is damaged, or leads outside of the folder.
    """
    config = read_config(folder)
    weights = _weights_in(folder, config)
    check_config(config, weights, str(folder / CONFIG))
    return weights


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds; nothing if there is none."""
    if not (folder / CONFIG).is_symlink() and not (folder / CONFIG).exists():
        return {}
    return read_object(file_in(folder, CONFIG), MOST_CONFIG_BYTES)


def refuse_pickles(folder: Path) -> None:
    """Raises SlimLoadError for a folder whose only weights are pickles, which can run code while they are read."""
    found = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    found = [name for name in found if "model" in name]
    if found:
        raise SlimLoadError(
            f"'{folder}' has no weights in safetensors, only {', '.join(map(shown, found[:3]))}, which can run code "
            "while they are read. Convert them where you trust them, with `model.save_pretrained(folder)`."
        )


def read_weights(files: Iterable[Path]) -> Weights:
    """What some safetensors files hold together. Raises SlimLoadError if a tensor is in two of them."""
    tensors: dict[str, StoredTensor] = {}
    files, size = tuple(files), 0
    for path in files:
        header = read_header(path)
        if repeated := tensors.keys() & header.tensors.keys():
            raise SlimLoadError(
                f"The tensor {shown(min(repeated))} is in '{path}' and in another shard; allowed is one. {AGAIN}"
            )
        tensors |= header.tensors
        size += header.size_bytes
    return Weights(files, tensors, size)


def check_config(config: dict[str, Any], weights: Weights | None, where: str) -> None:
    """Raises SlimLoadError for a config that asks for more parts than its weights hold, or for code from elsewhere.

    Args:
        weights: None: they are not known.
        where: Path of the config, for the message.
    """
    for name, value in _entries(config):
        if name in _CODE and isinstance(value, str) and "/" in value:
            raise SlimLoadError(
                f"'{where}' names {shown(value)} as `{name}`, which is code to be downloaded. Remove the line, or "
                "name one of the implementations of transformers, such as 'sdpa'."
            )
        allowed = _most_of(name, weights)
        numbers = value if isinstance(value, list) else [value]
        if allowed is not None and any(type(number) is int and number > allowed for number in numbers):
            raise SlimLoadError(
                f"'{where}' says {shown(name)}: {shown(value)}; its weights allow at most {allowed:,}. {AGAIN}"
            )


def _most_of(name: str, weights: Weights | None) -> int | None:
    """The largest number that a config may give under this name; None: any."""
    if _LAYERS.search(name):  # most layers have tensors of their own; those of a few models share them
        return max(MOST_LAYERS, 0 if weights is None else len(weights.tensors))
    if _COUNTED.search(name):
        largest = weights.largest_size if weights is not None else MOST_LABELS if name.endswith("labels") else 0
        return max(MOST_COUNTED, largest)
    return None


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every name with its value, those of inner configs included."""
    left: list[Any] = [config]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from ((str(name), inner) for name, inner in value.items())
            left += value.values()
        elif isinstance(value, list):
            left += [inner for inner in value if isinstance(inner, dict | list)]


def _weights_in(folder: Path, config: dict[str, Any]) -> Weights | None:
    """The files that transformers would read, in its order."""
    name = config.get("transformers_weights")
    if name is None:
        here = (one for one in (WEIGHTS, INDEX) if (folder / one).exists() or (folder / one).is_symlink())
        name = next(here, None)
        if name is None:
            return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise SlimLoadError(
            f"`transformers_weights` in '{folder / CONFIG}' must name a safetensors file or an index, got "
            f"{shown(name)}. {AGAIN}"
        )
    path = file_in(folder, name)
    return read_weights([path]) if name.endswith(".safetensors") else _indexed(folder, path)


def _indexed(folder: Path, index: Path) -> Weights:
    content = read_object(index, MOST_INDEX_BYTES)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not isinstance(content.get("metadata"), dict):
        raise SlimLoadError(
            f"'{index}' must have `metadata` and a `weight_map` from tensors to shards, got {shown(content)}. {AGAIN}"
        )
    names = {name if isinstance(name, str) else shown(name) for name in shards.values()}
    for name in sorted(names):
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            file_in(folder, name)  # says what is wrong with a path
            raise SlimLoadError(f"'{index}' names the shard {shown(name)}; shards end in '.safetensors'. {AGAIN}")
    weights = read_weights(file_in(folder, name) for name in sorted(names))
    if missing := shards.keys() - weights.tensors.keys():
        raise SlimLoadError(
            f"'{index}' names the tensor {shown(min(missing))}, which no shard holds ({len(missing)} such). {AGAIN}"
        )
    return weights


def shards_of(index: Path) -> list[str]:
    """Names of the shards that an index names, for fetching them; `check_model_folder` checks them."""
    found = read_object(index, MOST_INDEX_BYTES).get("weight_map")
    names = {name for name in found.values() if is_plain_name(name)} if isinstance(found, dict) else set()
    return sorted(names)
