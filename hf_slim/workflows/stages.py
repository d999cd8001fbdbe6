"""The folders of an unfinished run, from which `--resume` continues an interrupted one."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.errors import SlimError, SlimLoadError
from hf_slim.core.files.header import read_header
from hf_slim.integration.loading import load_model, load_tokenizer
from hf_slim.integration.saving import publish
from hf_slim.recipe import Recipe
from hf_slim.workflows.folders.verify import verify

logger = logging.getLogger(__name__)


class RunFolders:
    """The checkpoints of every stage, and the models of the finished ones.

    Args:
        scratch: Temporary folder, for stages whose checkpoints the recipe does not save.
    """

    def __init__(self, recipe: Recipe, scratch: Path):
        output = Path(recipe.output)
        self.recipe, self.scratch = recipe, scratch
        self.root = output.with_name(f"{output.name}.checkpoints")

    def checkpoints(self, number: int) -> Path:
        """The folder that the Trainer of a stage, counted from 1, writes to."""
        if self.recipe.runs[number - 1].training.get("save_strategy", "no") == "no":
            return self.scratch / f"trainer-{number}"
        return self._stage(number) if self.recipe.stages else self.root

    def model(self, number: int) -> Path:
        """The folder of the model of a finished stage."""
        return self._stage(number) / "model"

    def finished(self) -> int:
        """Number of finished stages; the last stage is not counted, because it ends with the run."""
        numbers = range(1, len(self.recipe.stages))
        return max((number for number in numbers if (self.model(number) / "config.json").is_file()), default=0)

    def keep(self, number: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, log: list[dict]) -> None:
        """Saves the log and the model of a finished stage; the model is moved into place when it is complete."""
        self._stage(number).mkdir(parents=True, exist_ok=True)
        (self._stage(number) / "log.json").write_text(json.dumps(log), "utf-8")
        publish(model, tokenizer, self.model(number))

    def load(self, number: int, auto_class: type) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model and tokenizer of a finished stage. Raises SlimLoadError if its folder is not what the stage wrote."""
        folder = str(self.model(number))
        verify(folder)
        return load_model(folder, auto_class=auto_class), load_tokenizer(folder)

    def log(self, number: int) -> list[dict[str, Any]]:
        """The training log of a finished stage."""
        path = self._stage(number) / "log.json"
        try:
            return json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise SlimLoadError(
                f"'{path}', the log of a finished stage, is not readable: {error}. Remove '{path.parent}' and resume "
                "again: the stage is then repeated."
            ) from error

    def restart(self, overwrite: bool) -> None:
        """Deletes the stages of an interrupted run. Raises SlimError if there are some and `overwrite` is False."""
        if self.recipe.stages and any(self.root.glob("stage-*/*")):
            if not overwrite:
                raise SlimError(
                    f"'{self.root}' holds stages of an interrupted run. Pass --resume to continue after them, or "
                    "--overwrite to start again from the first stage."
                )
            for folder in self.root.glob("stage-*"):
                shutil.rmtree(folder)

    def clear(self) -> None:
        """Deletes the models of finished stages once the run is complete; the Trainer's checkpoints are kept."""
        for number in range(1, len(self.recipe.stages)):
            shutil.rmtree(self.model(number), ignore_errors=True)
            (self._stage(number) / "log.json").unlink(missing_ok=True)
            for folder in (self._stage(number), self.root):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    def _stage(self, number: int) -> Path:
        return self.root / f"stage-{number}"


def newest_checkpoint(folder: Path) -> str | None:
    """The Trainer's newest complete checkpoint, None if there is none; damaged ones are skipped."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())  # the Trainer writes this file last
            for file in checkpoint.glob("*.safetensors"):
                read_header(file)  # compares the header with the length of the file
        except (OSError, ValueError):  # a SlimLoadError is a ValueError
            logger.warning("Checkpoint %s is incomplete or damaged and is skipped.", checkpoint)
            continue
        return str(checkpoint)
    return None


def last_checkpoint(folder: Path) -> str:
    """`newest_checkpoint`. Raises SlimError if there is none."""
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise SlimLoadError(
            f"There is no complete checkpoint in '{folder}' to resume from. Set `training.save_strategy: steps` and "
            "`training.save_steps`, or start without --resume."
        )
    return checkpoint
