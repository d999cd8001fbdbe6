"""A model and its tokenizer on disk: complete or not there at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.errors import SlimError
from hf_slim.core.files.durable import settle, sync
from hf_slim.integration.trust.manifest import write_manifest


def check_output(output: Path, overwrite: bool) -> None:
    """Raises SlimError if the output folder holds something that this run must not touch."""
    if output.is_file():
        raise SlimError(f"`output` '{output}' is a file. Choose a folder that does not exist yet.")
    if (output / "config.json").exists() and not overwrite:
        raise SlimError(
            f"`output` '{output}' already holds a finished model. Choose another folder, or pass --overwrite to "
            "replace it once the new model is complete."
        )
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").exists():
        raise SlimError(f"`output` '{output}' is a folder with other files in it. Choose a new or an empty folder.")


def publish(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes the model next to `output` and moves it into place in one step; an older model is kept until then.

    The folder gets a manifest of its files, is on the disk before it is moved, and may be read by whoever may read
    other new files of the user.

    Args:
        check: Is handed the complete folder before it is moved; what it raises leaves `output` as it was.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    for stale in output.parent.glob(f"{output.name}.partial-*"):
        shutil.rmtree(stale)  # of a run that was killed
    partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f"{output.name}.partial-"))
    save(model, tokenizer, partial)
    try:
        check(partial)
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
    """Writes model and tokenizer into a folder as `from_pretrained` reads them."""
    model.config.use_cache = True  # Trainer switches it off for training; who loads the model wants to generate
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
