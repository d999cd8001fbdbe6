"""A folder with a finished model: which of its files belong to the model, and what they say about it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open

from hf_slim.core.errors import SlimLoadError
from hf_slim.integration.formats.remote_code import FILE, MODULE
from hf_slim.integration.hf_quantizer import MARK

REPORT, CARD, PICTURE = "report.json", "README.md", "report.png"
# what `save_pretrained` of models, tokenizers and processors writes, and reports; no pickles, logs or optimizer states
KINDS = {".safetensors", ".json", ".jinja", ".model", ".spm", ".md", ".png", ".gguf"}
TEXTS = {"vocab.txt", "merges.txt"}
LEGAL = ("LICENSE", "NOTICE")
STATE = "trainer_state.json"  # in a checkpoint; `trainer.save_state` also puts it beside a finished model
OF_TRAINING = {STATE, "all_results.json", "train_results.json", "eval_results.json"}
OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelFolder:
    """A finished model on disk.

    Attributes:
        path: The folder.
        files: Names of the files that belong to the model, in order.
        left_out: Names of the other files and folders.
        report: What `report.json` says; None if there is none.
    """

    path: Path
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    report: dict[str, Any] | None


def read_folder(folder: str | Path, with_report: bool = True) -> ModelFolder:
    """The finished model in a folder.

    Args:
        with_report: Read the report too; without it `report` is None.
    Raises: SlimLoadError: if there is none: no config, missing or damaged weights, a training checkpoint, or a report
        that is about other weights.
    """
    path = Path(folder)
    if not path.is_dir():
        raise SlimLoadError(f"The folder '{folder}' does not exist. Give a folder that `hf-slim train` has written.")
    config = read_config(path)
    _check_finished(path, config)
    modules = {str(target).partition(".")[0] for target in (config.get("auto_map") or {}).values()}
    kinds = KINDS | ({".py"} if modules - {MODULE} else set())  # code that the config refers to
    names = sorted(entry.name for entry in path.iterdir())
    ours = {FILE} if MODULE in modules else set()
    files = tuple(name for name in names if name in ours or _belongs(path / name, kinds))
    report = read_report(path) if with_report and (path / REPORT).is_file() else None
    if report is not None:
        check_report(report, path)
    return ModelFolder(path, files, tuple(name for name in names if name not in files), report)


def read_config(folder: Path) -> dict[str, Any]:
    """What the folder's config.json says. Raises SlimLoadError if it is missing or damaged."""
    if not (folder / "config.json").is_file():
        raise SlimLoadError(
            f"'{folder}' holds no finished model: it has no config.json. Give a folder that `hf-slim train` or "
            "`save_pretrained` has written."
        )
    return _read_json(folder / "config.json")


def read_report(folder: Path) -> dict[str, Any]:
    """What the folder's report.json says. Raises SlimLoadError if it is missing, damaged, or no report."""
    if not (folder / REPORT).is_file():
        raise SlimLoadError(
            f"'{folder}' has no report.json, and a card shows nothing that was not measured. Measure the model with "
            f"`hf-slim eval {folder} --against BASE --json {folder / REPORT}`."
        )
    report = _read_json(folder / REPORT)
    if not {"title", "base", "result", "ratios"} <= report.keys():
        raise SlimLoadError(
            f"'{folder / REPORT}' is no report of hf_slim. Write one with `hf-slim eval ... --json {folder / REPORT}`."
        )
    return report


def describe_saved(folder: Path) -> dict[str, Any]:
    """What a report says about the folder of its result.

    Returns: `format` ("standard", "slim", or the quantization method of another library), `auto_class` (loads it),
        `has_tokenizer`, `techniques` (name -> config, as far as config.json says them), `weights` (file -> SHA-256).
    """
    config = read_config(folder)
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method", "standard")
    own = quantization.get(MARK, quantization)  # in the format of another library it is what hf_slim adds
    return {
        "format": "slim" if method == "hf_slim" else method,
        "auto_class": auto_class(config),
        "has_tokenizer": any((folder / name).is_file() for name in TOKENIZERS),
        "techniques": own.get("techniques") or {},
        "weights": digests(folder),
    }


def bare_report(folder: Path) -> dict[str, Any]:
    """A report without any measure, for the card of a folder that has none: what its files say."""
    return {"title": folder.name, "base": {}, "result": {}, "ratios": {}, "saved": describe_saved(folder)}


def auto_class(config: dict[str, Any]) -> str:
    """Name of the class of transformers that loads a model with this config: an Auto class where there is one."""
    architecture = next(iter(config.get("architectures") or ()), "AutoModel")
    _, separator, head = architecture.partition("For")
    name = f"AutoModelFor{head}"
    return name if separator and hasattr(transformers, name) else architecture


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of weights, in hexadecimal: file name -> digest."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def check_report(report: dict[str, Any], folder: Path) -> None:
    """Raises SlimLoadError if the report says which weights it is about, and they are not those of the folder."""
    measured = report.get("saved", {}).get("weights")
    if measured and measured != digests(folder):
        raise SlimLoadError(
            f"'{folder / REPORT}' was measured on other weights than those in the folder. Measure them with `hf-slim "
            f"eval {folder} --against BASE --json {folder / REPORT}`, or delete the report."
        )


def _check_finished(folder: Path, config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config") or {}
    is_checkpoint = any((folder / name).exists() for name in OPTIMIZERS)
    is_checkpoint |= folder.name.startswith("checkpoint-") and (folder / STATE).exists()
    if is_checkpoint or quantization.get("mode") == "qat":
        raise SlimLoadError(
            f"'{folder}' is a checkpoint of a training run, not a finished model. Train to the end and give the "
            "folder of the result."
        )
    index = folder / "model.safetensors.index.json"
    expected = set(_read_json(index)["weight_map"].values()) if index.is_file() else set()
    found = {file.name for file in folder.glob("*.safetensors")}
    if missing := sorted(expected - found) or ([] if found else ["model.safetensors"]):
        raise SlimLoadError(f"'{folder}' lacks {', '.join(missing)}: the model is incomplete. Save it again.")
    for name in sorted(found):
        try:
            with safe_open(folder / name, "pt"):  # compares the header with the length of the file
                pass
        except (OSError, SafetensorError) as error:
            raise SlimLoadError(f"'{folder / name}' is damaged: {error}. Save the model again.") from error


def _belongs(file: Path, kinds: set[str]) -> bool:
    if not file.is_file() or file.name.startswith((".", "_")) or file.name in OF_TRAINING:
        return False
    return file.suffix in kinds or file.name in TEXTS or file.name.startswith(LEGAL)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SlimLoadError(f"'{file}' cannot be read: {error}. Write or fetch it again.") from error
    if not isinstance(found, dict):
        raise SlimLoadError(f"'{file}' must hold a mapping, got {type(found).__name__}. Write or fetch it again.")
    return found
