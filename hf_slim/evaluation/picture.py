"""Reports as one picture: base against result, and how sensitive each layer is to each scheme."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_slim.core.report import ROWS, find, improvement, table, value_of, within_spread
from hf_slim.evaluation.sensitivity import LayerSensitivity

logger = logging.getLogger(__name__)
BASE_COLOUR, RESULT_COLOUR, WORSE_COLOUR = "#b8bec8", "#2a6f97", "#b3432b"
COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """One measure of base and result.

    Attributes:
        label: The measure.
        texts: Base and result as the table shows them.
        measures: Base and result: numbers, or timings with `median`, `low` and `high`; None where not measured.
        smaller: Whether less is better.
        is_worse: Whether the result is behind the base by more than the spread of timings.
    """

    label: str
    texts: tuple[str, str]
    measures: tuple[Any, Any]
    smaller: bool
    is_worse: bool


def panels(report: dict[str, Any]) -> list[Panel]:
    """A panel for every measure in the table of a report, in its order."""
    shown = {label: (base, result) for label, base, result, _ in table(report)}
    found = []
    for label, path, _, smaller in ROWS:
        if label in shown:
            base, result = find(report["base"], path), find(report["result"], path)
            factor = improvement(base, result, smaller)
            is_worse = factor is not None and factor < 1 and not within_spread(base, result)
            found.append(Panel(label, shown[label], (base, result), smaller, is_worse))
    return found


def draw(report: dict[str, Any], path: Path) -> bool:
    """Writes a PNG with one bar chart per measure. Returns False, with a warning, if matplotlib is missing."""
    if (pyplot := _pyplot()) is None:
        return False
    found = panels(report)
    rows = math.ceil(len(found) / COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(10, 0.8 + 1.9 * rows), layout="constrained", squeeze=False)
    dtype = report["base"].get("dtype")
    compared = f"base: saved and measured in {dtype}; " if dtype else ""
    legend = f"{compared}red: worse than the base; lines: smallest and largest time"
    figure.suptitle(f"{report['title']}\n{legend}", fontsize=11)
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, found, strict=False):
        _draw_panel(axis, panel, report["ratios"].get(panel.label))
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
    return True


def _draw_panel(axis: Any, panel: Panel, ratio: float | None) -> None:
    values = [value_of(measure) or 0 for measure in panel.measures]
    most = max([*values, *(m["high"] for m in panel.measures if isinstance(m, dict))]) or 1
    colours = [BASE_COLOUR, WORSE_COLOUR if panel.is_worse else RESULT_COLOUR]
    axis.barh(["base", "result"], values, color=colours, height=0.62)
    for position, (text, measure) in enumerate(zip(panel.texts, panel.measures, strict=True)):
        is_short = values[position] < 0.4 * most  # then the text is after the bar
        end = measure["high"] if isinstance(measure, dict) else values[position]
        axis.text((end if is_short else 0) + 0.02 * most, position, text.split(" [")[0], va="center", fontsize=9,
                  color="white" if position and not is_short else "black")  # fmt: skip
        if isinstance(measure, dict):
            axis.plot([measure["low"], measure["high"]], [position, position], color="black", linewidth=1)
    axis.set_title(
        f"{panel.label}: {ratio:.2f}x" if ratio else panel.label, fontsize=10, loc="left", fontweight="bold"
    )
    better = "less is better" if panel.smaller else "more is better"
    axis.set_xlabel(f"{better}; above 1x is better" if ratio else better, fontsize=8, color="#666666", loc="left")
    axis.set_xlim(0, most * 1.02)
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def draw_sensitivity(found: list[LayerSensitivity], chosen: dict[str, str], path: Path) -> bool:
    """Writes a PNG: the divergence of every scheme in every layer on a logarithmic scale, the chosen ones marked.

    Returns: False, with a warning, if matplotlib is missing.
    """
    if (pyplot := _pyplot()) is None:
        return False
    bits = {choice.scheme: choice.bits for layer in found for choice in layer.choices}
    figure, axis = pyplot.subplots(figsize=(max(7, 0.07 * len(found) + 3), 4.2), layout="constrained")
    for rank, scheme in enumerate(sorted(bits, key=bits.get)):
        points = [(i, c.divergence) for i, layer in enumerate(found) for c in layer.choices if c.scheme == scheme]
        picked = [(i, divergence) for i, divergence in points if chosen[found[i].name] == scheme]
        colour = pyplot.get_cmap("viridis")(rank / max(len(bits) - 1, 1))
        axis.plot(*zip(*points, strict=True), color=colour, linewidth=0.8, alpha=0.6)
        label = f"{scheme}: {len(picked)} of {len(found)} layers"
        axis.scatter(*(zip(*picked, strict=True) if picked else ((), ())), color=colour, s=14, label=label)
    axis.set_yscale("log")
    axis.set_title("Divergence of each scheme in each layer alone; dots: chosen schemes", fontsize=11, loc="left")
    axis.set_xlabel("layer, in model order")
    axis.set_ylabel("KL to the original model, nats per token")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
    return True


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        logger.warning("No picture was drawn, because matplotlib is missing. Run `pip install 'hf_slim[demo]'`.")
        return None
    return pyplot
