"""The report at a glance: one picture of base against result."""

import logging
from pathlib import Path
from typing import Any

from hf_slim.core.report import ROWS, find, table, value_of

logger = logging.getLogger(__name__)
BASE_COLOUR, RESULT_COLOUR = "#b8bec8", "#2a6f97"


def draw(report: dict[str, Any], path: Path) -> bool:
    """Writes a PNG with one bar chart per measure. Returns False, with a warning, where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        logger.warning("No picture was drawn, because matplotlib is missing. Run `pip install 'hf_slim[demo]'`.")
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
            is_short = values[position] < 0.4 * max(values)  # then the text stands behind the bar
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
