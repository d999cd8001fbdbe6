"""From a finished model to the files of other runtimes: checked, written, read back, then moved into place."""

import dataclasses
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.errors import SlimError, SlimLoadError
from hf_slim.core.modules import evaluating
from hf_slim.export.exporter import ExportConfig, Exporter, Verification
from hf_slim.export.targets import EXPORTERS
from hf_slim.integration.loading import class_of, display_name, load_config, load_model, load_tokenizer
from hf_slim.integration.saving import check_output, publish_folder
from hf_slim.version import __version__

logger = logging.getLogger(__name__)
REPORT = "hf_slim_export.json"  # also marks a folder that an export made, and that a later one may replace
ALL = "all"


@dataclass(frozen=True)
class Exported:
    """One export that is complete.

    Attributes:
        target: Its name in `EXPORTERS`.
        path: What its consumer opens.
        size_bytes: Of all files.
        command: One line that runs it.
        verification: What was compared when it was read back.
    """

    target: str
    path: Path
    size_bytes: int
    command: str
    verification: Verification


@dataclass(frozen=True)
class ExportReport:
    """What `export_model` did.

    Attributes:
        exports: Those that were written.
        refused: Target -> why it does not hold this model; only with "all" or several targets.
    """

    exports: tuple[Exported, ...]
    refused: dict[str, str]


def export_model(
    model: str | Path | PreTrainedModel,
    output: str | Path,
    to: str | Iterable[str] = "gguf",
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_rounding: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a finished model for other runtimes, from the trained codes themselves: `hf-slim export`.

    Every value of what is written is read back and compared before it is moved into place.

    Args:
        model: A folder, a Hub id, or a converted model in memory.
        output: Folder for the files; with several targets each gets a folder of its name in it.
        to: A registered target, several of them, or "all".
        tokenizer: Of a model in memory; that of a folder is read from there.
        allow_rounding: Whether a weight that a format cannot hold exactly may be rounded.
        overwrite: Replace an earlier export in the output folder, once the new one is complete.
    Raises: SlimError: if a target is unknown, does not hold the model exactly, or is the only one and refuses it;
        nothing was written then.
    """
    folders = _folders(to, Path(output), overwrite)
    if isinstance(model, str | Path):
        model, tokenizer = _loaded(str(model), tokenizer)
    if not isinstance(model, PreTrainedModel):
        raise SlimError(
            f"A {type(model).__name__} cannot be exported. Give a folder, or a model of transformers; adapters are "
            "merged by `convert(model)`, or by `merge_and_unload()`."
        )
    with evaluating(model), torch.no_grad():
        return _exported(model, tokenizer, folders, ExportConfig(allow_rounding))


def as_text(report: ExportReport) -> str:
    """The report for people: size, path, what was compared, and the command of every export."""
    lines = []
    for one in report.exports:
        found = one.verification
        equal = f"all {found.values:,} values equal"
        if found.differing:
            worst = f"by up to {found.largest_error:.1e} of themselves"
            equal = f"{found.differing:,} of {found.values:,} values were rounded, {worst}"
        lines += [
            f"{one.target}: {one.path}, {one.size_bytes / 1e6:.1f} MB",
            f"  read back: {equal}",
            *(f"  {name}: {result}" for name, result in found.runs.items()),
            *(f"  note: {note}" for note in found.notes),
            f"  run it: {one.command}",
        ]
    return "\n".join([*lines, *(f"{name}: not written. {reason}" for name, reason in report.refused.items())])


def _folders(to: str | Iterable[str], output: Path, overwrite: bool) -> dict[str, Path]:
    """Target -> its folder, for those whose packages are installed. Raises SlimError where nothing can be written."""
    names = list(EXPORTERS) if to == ALL else [to] if isinstance(to, str) else list(dict.fromkeys(to))
    folders = {name: output / name if len(names) > 1 else output for name in names}
    for name, folder in list(folders.items()):
        exporter: Exporter = EXPORTERS[name]
        check_output(folder, overwrite, REPORT)
        if missing := exporter.missing_packages():
            needs = f"{name} needs {', '.join(missing)}, which is not installed"
            logger.warning("%s: `pip install hf_slim[%s]`.", needs, exporter.extra)
            del folders[name]
    if not folders:
        raise SlimError(f"{needs}: `pip install hf_slim[{exporter.extra}]`.")
    return folders


def _loaded(
    spec: str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A model in the dtype of its checkpoint, and its tokenizer if it has one."""
    dtype = load_config(spec).dtype or torch.float32
    model = load_model(spec, dtype, class_of(spec))
    model.config.name_or_path = display_name(spec)
    if tokenizer is None:
        try:
            tokenizer = load_tokenizer(spec)
        except SlimLoadError as error:
            logger.warning("No tokenizer was found, and some targets need one: %s", error)
    return model, tokenizer


def _exported(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folders: dict[str, Path], config: ExportConfig
) -> ExportReport:
    """Writes every target that holds the model. Raises SlimError if none does."""
    refused = {name: reason for name in folders if (reason := EXPORTERS[name].refusal(model, tokenizer, config))}
    if len(refused) == len(folders):
        reasons = [f"{name}: {reason}" for name, reason in refused.items()]
        raise SlimError(reasons[0] if len(reasons) == 1 else f"No target holds this model. {' '.join(reasons)}")
    fitting = {name: folder for name, folder in folders.items() if name not in refused}
    exports = [_written(name, model, tokenizer, folder, config) for name, folder in fitting.items()]
    return ExportReport(tuple(exports), refused)


def _written(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, output: Path, config: ExportConfig
) -> Exported:
    """Writes and verifies one export, and moves it into place."""
    exporter: Exporter = EXPORTERS[name]
    found: list[tuple[Path, int, Verification]] = []

    def fill(folder: Path) -> None:
        path = exporter.write(model, tokenizer, folder, config)
        verification = exporter.verify(model, tokenizer, path, config)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        place = path.relative_to(folder)
        found.append((place, size, verification))
        report = {
            "target": name, "path": str(place), "size_bytes": size, "hf_slim": __version__,
            "config": config.to_dict(), "verification": dataclasses.asdict(verification),
        }  # fmt: skip
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")

    publish_folder(output, fill)
    place, size, verification = found[0]
    return Exported(name, output / place, size, exporter.command(output / place), verification)
