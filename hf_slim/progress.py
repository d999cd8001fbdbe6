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
    """A progress bar on stderr around `iterable`, or one that the caller moves with `update`.

    Args:
        iterable: What to iterate over; None for a bar that is moved by hand, in a `with` block.
        description: What is being done, in a few words: "reading text".
        unit: What is counted, in the singular: "block".
        total: How many there are, where `iterable` has no length.
        shown: False hides this one bar, as on all ranks but the first.
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
