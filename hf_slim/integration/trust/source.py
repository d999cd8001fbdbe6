"""The files of a model, in its folder or in the cache of the Hub: checked before transformers reads them."""

from pathlib import Path

from transformers.utils.hub import cached_file

from hf_slim.core.errors import SlimLoadError
from hf_slim.core.files.model_folder import (
    CONFIG,
    INDEX,
    WEIGHTS,
    Weights,
    check_model_folder,
    refuse_pickles,
    shards_of,
)


def checked_weights(name: str) -> Weights | None:
    """What the weights of a model are, once config, index and headers were checked.

    Args:
        name: A folder, or a Hub id, whose files are fetched as `from_pretrained` would.
    Returns: None where that is unknown: for an adapter, or a Hub id that cannot be fetched.
    Raises: SlimLoadError: where the files are damaged, lead outside of the folder, or are not in safetensors.
    """
    folder = Path(name) if Path(name).is_dir() else _fetched(name)
    if folder is None:
        return None
    weights = check_model_folder(folder)
    if weights is None:
        refuse_pickles(folder)
    return weights


def _fetched(hub_id: str) -> Path | None:
    """The folder of the cache with config and weights of a model."""
    try:
        config = cached_file(hub_id, CONFIG)
    except (OSError, ValueError):  # `from_pretrained` says why
        return None
    if config is None:
        return None
    if cached_file(hub_id, WEIGHTS, _raise_exceptions_for_missing_entries=False) is None:
        index = cached_file(hub_id, INDEX, _raise_exceptions_for_missing_entries=False)
        if index is None:
            raise SlimLoadError(
                f"'{hub_id}' has no weights in safetensors, and other files can run code while they are read. Name "
                "another revision or model, or convert it where you trust it, with `model.save_pretrained(folder)`."
            )
        for shard in shards_of(Path(index)):
            cached_file(hub_id, shard)
    return Path(config).parent
