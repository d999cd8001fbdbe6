"""The report of a run: a dictionary of measured numbers, and tables made from it."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_slim.core.files.durable import settle_file, sync, usual_mode

SCHEMA_VERSION = 1
STDLIB = "the source files of Python's standard library"  # the data source `stdlib`, for people

# label, path in the measures of a model, unit of display, whether smaller is better
ROWS: tuple[tuple[str, tuple[str, ...], str, bool], ...] = (
    ("held-out perplexity", ("quality", "perplexity"), "plain", True),
    ("held-out accuracy", ("quality", "accuracy"), "percent", False),
    ("held-out loss", ("quality", "loss"), "plain", True),
    ("files on disk", ("memory", "disk_bytes"), "bytes", True),
    ("weights in RAM", ("memory", "ram_bytes"), "bytes", True),
    ("peak RSS", ("memory", "peak_rss_bytes"), "bytes", True),
    ("parameters", ("compute", "parameters"), "millions", True),
    ("multiply-adds per token", ("compute", "multiply_adds_per_token"), "millions", True),
    ("attention multiply-adds per token", ("compute", "attention_multiply_adds_per_token"), "millions", True),
    ("prefill", ("inference", "prefill_ms"), "ms", True),
    ("decode", ("inference", "decode_tokens_per_s"), "tokens/s", False),
    ("throughput", ("inference", "samples_per_s"), "samples/s", False),
    ("training step", ("training", "step_ms"), "ms", True),
)


def find(measures: dict[str, Any], path: tuple[str, ...]) -> Any:
    """The measure at `path`; None if there is none."""
    found: Any = measures
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def value_of(measure: Any) -> float | None:
    """The number of a measure: the median if it has samples."""
    return measure["median"] if isinstance(measure, dict) else measure


def improvement(base: Any, result: Any, smaller_is_better: bool) -> float | None:
    """The factor by which the result is better than the base; below 1, it is worse. None if one was not measured."""
    base, result = value_of(base), value_of(result)
    if not base or not result:
        return None
    return base / result if smaller_is_better else result / base


def within_spread(base: Any, result: Any) -> bool:
    """Whether both are timings whose ranges, from the smallest to the largest, overlap: they may not differ."""
    timed = isinstance(base, dict) and isinstance(result, dict)
    return timed and base["low"] <= result["high"] and result["low"] <= base["high"]


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """`improvement` of every row that was measured on both sides."""
    found = {}
    for label, path, _, smaller in ROWS:
        ratio = improvement(find(report["base"], path), find(report["result"], path), smaller)
        if ratio is not None:
            found[label] = ratio
    return found


def table(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (measure, base, result, ratio) as text, with "not measured" for a missing measure."""
    rows = []
    for label, path, unit, _ in ROWS:
        base, result = find(report["base"], path), find(report["result"], path)
        if base is None and result is None:
            continue
        ratio = report["ratios"].get(label)
        rows.append((label, _show(base, unit), _show(result, unit), f"{ratio:.2f}x" if ratio else "-"))
    return rows


def as_text(report: dict[str, Any]) -> str:
    """The table for a terminal, with notes."""
    rows = [("", "base", "result", "improvement"), *table(report)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in
                       enumerate(zip(row, widths, strict=True))) for row in rows]  # fmt: skip
    remarks = [f"\n{note}" for note in (*notes_on_base(report), *notes(report))]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *remarks])


def notes(report: dict[str, Any]) -> list[str]:
    """Remarks that explain the table, as sentences; those of the report are first."""
    found = list(report.get("notes", ()))
    base, result = (find(report[side], ("compute", "vocabulary")) for side in ("base", "result"))
    if base != result and find(report["result"], ("quality", "perplexity")):
        found.append(
            f"Both perplexities are for the same tokens of the same text. The base predicts each among {base:,}, the "
            f"result among {result:,}; this alone makes its perplexity slightly smaller."
        )
    length = find(report["result"], ("compute", "attention_length"))
    if length:
        found.append(
            f"Attention multiply-adds: products of queries and keys, and of probabilities and values, for a text of "
            f"{length} tokens. They grow with its length and are not part of the row above."
        )
    speed = report["result"].get("inference", {})
    if "samples_per_s" in speed:
        found.append(f"Throughput: batches of {speed['batch_size']} x {speed['tokens_per_sample']} tokens, unpadded.")
    return found


def notes_on_base(report: dict[str, Any]) -> list[str]:
    """What the base is: how its files compare with those that it was loaded from, and whether it was trained."""
    source = find(report, ("sources", "model", "bytes"))
    base, result = (find(report[side], ("memory", "disk_bytes")) for side in ("base", "result"))
    found = []
    if source and base and result and source < 0.9 * base:
        change = f"{source / result:.2f}x smaller than" if result < source else f"{result / source:.2f}x the size of"
        found.append(
            f"The base is counted as {base / 1e6:.1f} MB, saved as {report['base'].get('dtype', 'float32')}. It was "
            f"loaded from files of {source / 1e6:.1f} MB; the result is {change} those."
        )
    if report.get("base_is_tuned") is False and report["base"].get("quality"):
        found.append("The base is the model as it was given; only the result was trained in this run.")
    return found


def as_markdown(report: dict[str, Any]) -> str:
    """The whole report as Markdown: table, completions, layers, environment and recipe."""
    rows = "\n".join(f"| {label} | {base} | {result} | {ratio} |" for label, base, result, ratio in table(report))
    environment = "\n".join(f"- {name}: {value}" for name, value in report["environment"].items())
    spread = (
        "Times are medians over interleaved rounds in one process, with the smallest and largest in brackets. "
        "Ratios above 1 are better."
    )
    parts = [
        f"# {report['title']}",
        spread,
        f"| measure | base | result | improvement |\n|---|---:|---:|---:|\n{rows}",
        *notes_on_base(report),
        *notes(report),
        _completions(report),
        _layers(report["layers"]),
        f"## Environment\n\n{environment}",
        f"## Recipe\n\n```json\n{json.dumps(report['recipe'], indent=2)}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary file in the folder of `path`, then moves the file to `path` in one step.

    Its content is on the disk by then, and it has the access rights of a new file.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        settle_file(Path(name), usual_mode(path.parent))
        os.replace(name, path)
        sync(path.parent)
    finally:
        Path(name).unlink(missing_ok=True)


def _completions(report: dict[str, Any]) -> str:
    texts = {side: report[side].get("prompt_and_completion") for side in ("base", "result")}
    if None in texts.values():  # not a language model
        return ""
    return "## The same prompt\n\n" + "\n\n".join(f"```python\n{text}\n```\n*{side}*" for side, text in texts.items())


def _layers(layers: list[dict[str, Any]]) -> str:
    if not layers:
        return ""
    counts = Counter(layer["scheme"] or f"float: {layer['reason']}" for layer in layers)
    rows = "\n".join(f"| {scheme} | {count} |" for scheme, count in counts.items())
    return f"## Layers\n\n| grid | layers |\n|---|---:|\n{rows}"


def _show(measure: Any, unit: str) -> str:
    value = value_of(measure)
    if value is None:
        return "not measured"
    if unit == "bytes":
        return f"{value / 1e6:.1f} MB"
    if unit == "millions":
        return f"{value / 1e6:.1f} M"
    if unit == "percent":
        return f"{value:.2%}"
    if unit == "plain":
        return f"{value:.2f}"
    return f"{value:.1f} {unit} [{measure['low']:.1f}, {measure['high']:.1f}]"
