"""The one exception that users are meant to read."""

import difflib
from collections.abc import Iterable


class SlimError(ValueError):
    """Something the user can cure: says what arrived, what is allowed and what to do next.

    The command line prints its message as one paragraph and exits with code 2; nothing on disk has changed by then.
    """


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A short phrase that leads from a wrong name to the right one, to end an error message with."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Allowed: {', '.join(allowed)}."
