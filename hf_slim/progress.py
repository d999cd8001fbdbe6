"""Progress bars, all in one style and with one switch. The only file that imports tqdm."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

_settings = {"shown": True}


def progress(
    iterable: Iterable[Any] | None,
    description: str,
    unit: str,
    total: int | None = None,
    shown: bool = True,
    scaled: bool = False,
) -> tqdm:
    """A progress bar on stderr around `iterable`, or a bar that the caller updates.

    Args:
        iterable: The items to iterate over; None for a bar that is used in a `with` block and updated with `update`.
        description: The task in a few words: "reading text".
        unit: Name of an item in the singular: "block".
        total: Number of items, if `iterable` has no length.
        shown: False hides this bar, for example on all ranks except the first.
        scaled: Whether counts are shortened: 1.2M for 1,200,000.
    """
    is_hidden = not (shown and progress_is_shown())
    return tqdm(iterable, desc=description, unit=unit, total=total, unit_scale=scaled, disable=is_hidden)


def show_progress(shown: bool) -> None:
    """Switches all progress bars of hf_slim on or off in this process; they are on at first."""
    _settings["shown"] = shown


def progress_is_shown() -> bool:
    """Whether progress bars are switched on in this process."""
    return _settings["shown"]


def print_above_bars(text: str) -> None:
    """Prints a line on stderr without breaking a bar that is being shown."""
    tqdm.write(text, file=sys.stderr)
