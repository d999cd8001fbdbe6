"""The errors that users are meant to read, and how to tell them from mistakes in our own code."""

import difflib
import traceback
from collections.abc import Iterable

MISTAKES = (AssertionError, AttributeError, NameError, TypeError)  # kinds that a mistake in code raises


class SlimError(ValueError):
    """Something the user can cure: says what arrived, what is allowed and what to do next.

    The command line prints its message as one paragraph and exits with code 2; nothing on disk has changed by then.
    """


class SlimConfigError(SlimError):
    """A setting, a recipe or an option is unknown, misspelt, out of range, or contradicts another one."""


class SlimDataError(SlimError):
    """A data set cannot be read, lacks a column, or holds text or labels that the task cannot use."""


class SlimLoadError(SlimError):
    """A model, tokenizer, checkpoint or stored teacher is missing, incomplete, damaged, or of another kind."""


class SlimHubError(SlimError):
    """The Hugging Face Hub was not reached, or refused a request; nothing on this machine has changed."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A short phrase that leads from a wrong name to the right one, to end an error message with."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Allowed: {', '.join(allowed)}."


def is_own_mistake(error: BaseException) -> bool:
    """Whether code of hf_slim raised `error`, and it is of a kind that only a mistake in code raises.

    A function that calls a host library and turns whatever the library raises into a SlimError asks this first: such a
    mistake must not be reported as a damaged file or an illegal size.

    Args:
        error: As caught, with its traceback. What the host library raised by itself, called by hf_slim, is no mistake
            of ours; what hf_slim raised when the library called it back is.
    """
    if not isinstance(error, MISTAKES):
        return False
    ours = [_is_ours(frame.f_globals) for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = ours.index(False) if False in ours else len(ours)  # the first frame of the host library
    return inside == len(ours) or any(ours[inside:])


def _is_ours(names: dict[str, object]) -> bool:
    return str(names.get("__name__", "")).partition(".")[0] == __name__.partition(".")[0]
