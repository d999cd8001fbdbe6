"""Saves a model and its tokenizer in one step, so that the folder never has an incomplete model."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.errors import SlimError
from hf_slim.core.files.durable import settle, sync
from hf_slim.integration.trust.manifest import write_manifest


def check_output(output: Path, overwrite: bool, mark: str = "config.json") -> None:
    """Raises SlimError if the output folder cannot be written, or contains files that this run must not replace.

    Args:
        mark: The file by which a finished folder of this kind is known, one that may be replaced.
    """
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir():
        raise SlimError(f"`output` '{output}' lies under '{above}', which is a file. Choose another folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SlimError(f"`output` '{output}' cannot be written: '{above}' is read-only. Choose another folder.")
    if output.is_file():
        raise SlimError(f"`output` '{output}' is a file. Choose a folder that does not exist yet.")
    if (output / mark).exists() and not overwrite:
        raise SlimError(
            f"`output` '{output}' already holds a finished model. Choose another folder, or pass --overwrite to "
            "replace it once the new model is complete."
        )
    if output.is_dir() and any(output.iterdir()) and not (output / mark).exists():
        raise SlimError(f"`output` '{output}' is a folder with other files in it. Choose a new or an empty folder.")


def publish(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """`publish_folder` for a model and its tokenizer.

    The folder gets a manifest of its files, is on the disk before it is moved, and may be read by whoever may read
    other new files of the user.

    Args:
        check: Called with the complete folder before it is moved; if it raises an error, `output` does not change.
    """

    def fill(folder: Path) -> None:
        save(model, tokenizer, folder)
        check(folder)

    publish_folder(output, fill)


def publish_folder(output: Path, fill: Callable[[Path], None]) -> None:
    """Writes a folder next to `output` and moves it into place in one step; an older one is kept until then.

    Args:
        fill: Writes into an empty folder; what it raises leaves `output` as it was.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    for stale in output.parent.glob(f"{output.name}.partial-*"):
        shutil.rmtree(stale)  # left by a run that was killed
    partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f"{output.name}.partial-"))
    try:
        fill(partial)
    except Exception:
        shutil.rmtree(partial)
        raise
    write_manifest(partial)
    settle(partial)
    replaced = output.with_name(f"{output.name}.replaced")
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(output, replaced)
    os.replace(partial, output)
    sync(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes model and tokenizer into a folder, in the form that `from_pretrained` reads."""
    model.config.use_cache = True  # Trainer disables it for training, and generation needs it
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
