"""A model and its tokenizer on disk: complete or not there at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.errors import SlimError


def check_output(output: Path, overwrite: bool, mark: str = "config.json") -> None:
    """Raises SlimError if the output folder holds something that this run must not touch.

    Args:
        mark: The file by which a finished folder of this kind is known, one that may be replaced.
    """
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

    Args:
        check: Is handed the complete folder before it is moved; what it raises leaves `output` as it was.
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
        shutil.rmtree(stale)  # of a run that was killed
    partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f"{output.name}.partial-"))
    try:
        fill(partial)
    except Exception:
        shutil.rmtree(partial)
        raise
    partial.chmod(0o755)
    replaced = output.with_name(f"{output.name}.replaced")
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(output, replaced)
    os.replace(partial, output)
    shutil.rmtree(replaced, ignore_errors=True)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes model and tokenizer into a folder as `from_pretrained` reads them."""
    model.config.use_cache = True  # Trainer switches it off for training; who loads the model wants to generate
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
