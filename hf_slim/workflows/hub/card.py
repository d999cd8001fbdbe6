"""The card of a model, written into its folder."""

from pathlib import Path

from hf_slim.core.errors import SlimError
from hf_slim.core.report import write_atomically
from hf_slim.hub.card import is_untouched, render_card
from hf_slim.hub.folder import CARD, PICTURE, check_report, read_report


def write_card(folder: str | Path, overwrite: bool = False) -> Path:
    """Writes README.md into a folder from its report.json: `hf-slim card`.

    Args:
        folder: Holds report.json, and normally the model that it is about.
        overwrite: Replace a README.md that was not made by hf_slim, or has been edited since.
    Returns: the path of the card.

    Raises:
        SlimLoadError: if there is no report, or it is about other weights than those in the folder.
        SlimError: if there is a README.md that must not be replaced.
    """
    folder = Path(folder)
    report = read_report(folder)
    if (folder / "config.json").is_file():
        check_report(report, folder)
    card = folder / CARD
    if card.is_file() and not overwrite and not is_untouched(card.read_text("utf-8")):
        raise SlimError(
            f"'{card}' was edited, or was not written by hf_slim. Pass --overwrite to replace it, or keep it: "
            "`hf-slim push` sends it as it is."
        )
    text = render_card(report, folder.resolve().name, (folder / PICTURE).is_file())
    write_atomically(card, lambda path: path.write_text(text, "utf-8"))
    return card
