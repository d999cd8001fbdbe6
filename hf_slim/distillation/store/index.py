"""The index of a shard: which examples it holds, and where their predictions lie."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_slim.core.errors import SlimLoadError
from hf_slim.core.files.header import read_header
from hf_slim.distillation.store.check import check_offsets, described
from hf_slim.distillation.store.format import StoreInfo


@dataclass(frozen=True)
class ShardIndex:
    """Contents of a shard without its predictions.

    Attributes:
        keys: `(examples,)` int64, `row_key` of each example.
        offsets: `(examples + 1,)` int64, first prediction of each example, and the number of all.
        info: Settings of the store.
        mass_held: Probability of the stored classes, summed over predictions.
    """

    keys: Tensor
    offsets: Tensor
    info: StoreInfo
    mass_held: float


def read_index(path: Path) -> ShardIndex:
    """Read the index of a shard, once its header was checked.

    Args:
        path: A safetensors file.
    Raises: SlimLoadError: if the file is damaged.
    """
    header = read_header(path)
    info, mass_held = described(header, path)
    try:
        with safe_open(path, "pt") as file:
            keys, offsets = file.get_tensor("keys").clone(), file.get_tensor("offsets").clone()
    except (OSError, SafetensorError) as error:
        raise SlimLoadError(
            f"The shard '{path}' of a stored teacher is damaged: {error}. Copy it again, or delete it and run "
            "`hf-slim cache-teacher` again."
        ) from error
    check_offsets(offsets, header.tensors["ids"].shape[0], path)
    return ShardIndex(keys, offsets, info, mass_held)
