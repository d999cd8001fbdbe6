"""Reports as one picture: base against result, and how sensitive each layer is to each scheme."""

import logging
from pathlib import Path
from typing import Any

from hf_slim.core.report import ROWS, find, table, value_of
from hf_slim.evaluation.sensitivity import LayerSensitivity

logger = logging.getLogger(__name__)
BASE_COLOUR, RESULT_COLOUR = "#b8bec8", "#2a6f97"


def draw(report: dict[str, Any], path: Path) -> bool:
    """Writes a PNG with one bar chart per measure. Returns False, with a warning, if matplotlib is missing."""
    if (pyplot := _pyplot()) is None:
        return False
    shown = {label: (base, result, ratio) for label, base, result, ratio in table(report)}
    rows = [(label, path_, smaller) for label, path_, _, smaller in ROWS if label in shown]
    figure, axes = pyplot.subplots(3, 3, figsize=(10, 7.2), layout="constrained")
    figure.suptitle(f"{report['title']}   (above 1x is better)", fontsize=12)
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    for axis, (label, measure, smaller) in zip(axes.flat, rows, strict=False):
        base, result, ratio = shown[label]
        values = [value_of(find(report[side], measure)) or 0 for side in ("base", "result")]
        axis.barh(["base", "result"], values, color=[BASE_COLOUR, RESULT_COLOUR], height=0.62)
        for position, text in enumerate((base, result)):
            is_short = values[position] < 0.4 * max(values)  # then the text is to the right of the bar
            axis.text((values[position] if is_short else 0) + 0.02 * max(values), position, text.split(" [")[0],
                      va="center", fontsize=9, color="white" if position and not is_short else "black")  # fmt: skip
        better = "less is better" if smaller else "more is better"
        axis.set_title(f"{label}: {ratio}" if ratio != "-" else label, fontsize=10, loc="left", fontweight="bold")
        axis.set_xlabel(better, fontsize=8, color="#666666", loc="left")
        axis.set_xlim(0, max(values) * 1.02 or 1)
        axis.invert_yaxis()
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
    return True


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
