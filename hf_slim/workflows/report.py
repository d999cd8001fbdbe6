"""The report of a run: all measured numbers and the settings to repeat it, as JSON, Markdown and a picture."""

import datetime
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_slim.core.report import SCHEMA_VERSION, as_markdown, ratios, write_atomically
from hf_slim.core.report import as_text as table_as_text
from hf_slim.data import DataConfig
from hf_slim.evaluation.picture import draw
from hf_slim.hub.card import render_card
from hf_slim.hub.folder import CARD, PICTURE, REPORT, describe_saved
from hf_slim.hub.source import describe_data_source, describe_model_source
from hf_slim.integration.loading import display_name
from hf_slim.recipe import Recipe
from hf_slim.version import __version__

logger = logging.getLogger(__name__)


def build_report(
    recipe: Recipe, measured: dict[str, Any], layers: list[dict], log: list[dict], notes: list[str]
) -> dict[str, Any]:
    """The report: all measured numbers of the run, with recipe, versions and machine."""
    steps = [" + ".join(stage.techniques) or "fine-tuning" for stage in recipe.runs]
    if recipe.vocabulary is not None:
        steps.insert(0, "vocabulary")
    report = {
        "title": f"{display_name(recipe.model)}: {', then '.join(steps)}",
        **provenance(recipe.model, [stage.data for stage in recipe.runs], Path(recipe.output)),
        "seed": recipe.runs[0].training.get("seed", 42),
        "recipe": recipe.to_dict(),
        "base": measured["base"],
        "result": measured["result"],
        "notes": notes,
        "layers": layers,
        "training_log": log,
    }
    report["ratios"] = ratios(report)
    return report


def provenance(model: str, data: list[DataConfig], result: Path | None) -> dict[str, Any]:
    """What the numbers of a report belong to: versions, machine, base model, data, and the folder of the result.

    Args:
        model: The base: a Hub id, a folder, or `package:<module>/<file>`.
        result: Folder of the compressed model; None if it is not in one.
    """
    named = [describe_data_source(config) for config in data]
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "hf_slim_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "sources": {
            "model": describe_model_source(model),
            "data": [one for number, one in enumerate(named) if one not in named[:number]],
        },
    }
    return found | ({"saved": describe_saved(result)} if result is not None else {})


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal: title, table with notes, and both completions of one prompt."""
    parts = [report["title"], table_as_text(report)]
    for side in ("base", "result"):
        if text := report[side].get("prompt_and_completion"):
            parts.append(f"--- {side} completes the same prompt ---\n{text.rstrip()}")
    saved = report["recipe"]["output"]
    return (
        "\n\n".join(parts) + f"\n\nSaved to {saved}: the model, its card README.md, report.json, report.md, report.png"
    )


def next_commands(recipe: Recipe, report: dict[str, Any], recipe_file: str) -> list[str]:
    """Commands for the next step: inspect the result, share it, measure it again, prune earlier in training.

    Args:
        recipe_file: The path that the recipe was read from.
    """
    commands = [f"hf-slim inspect {recipe.output}", f"hf-slim push {recipe.output} USER/{Path(recipe.output).name}"]
    if recipe.stages:
        return commands
    if report["base"]["quality"]:
        commands.append(f"hf-slim eval {recipe.output} --against {recipe.model} {_data_options(recipe.data)}")
    if "pruning" in recipe.techniques:
        commands.append(f"hf-slim train {recipe_file} --set pruning.stop=0.3 --set output={recipe.output}-sooner")
    return commands


def _data_options(data: DataConfig) -> str:
    """The options of `hf-slim eval` for this data."""
    names = {"--text-column": " ".join(data.text_columns), "--label-column": data.label_column}
    given = {"--data": f"'{data.source}'", **names, "--block-size": str(data.block_size)}
    usual = {"--text-column": "text", "--label-column": "label", "--block-size": "512"}
    return " ".join(f"{option} {value}" for option, value in given.items() if usual.get(option) != value)


def environment() -> dict[str, str]:
    """The machine and the library versions that the numbers were measured with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_report(report: dict[str, Any], folder: Path) -> None:
    """report.json, report.md, report.png and the card in `folder`, each moved into place when complete."""
    logger.info("Writing the report to '%s'.", folder)
    write_atomically(folder / REPORT, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    write_atomically(folder / "report.md", lambda path: path.write_text(as_markdown(report)))
    if draw(report, folder / ".report.png"):
        os.replace(folder / ".report.png", folder / PICTURE)
    card = render_card(json.loads(json.dumps(report)), folder.name, (folder / PICTURE).is_file())
    write_atomically(folder / CARD, lambda path: path.write_text(card, "utf-8"))
