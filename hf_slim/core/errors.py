"""Errors with a message for users, and a check for errors that come from mistakes in hf_slim's code."""

import difflib
import traceback
from collections.abc import Iterable

MISTAKES = (AssertionError, AttributeError, NameError, TypeError)  # kinds that a mistake in code raises


class SlimError(ValueError):
    """An error that the user can fix. The message says which value was given, what is allowed and what to do next.

    The command line prints the message as one paragraph and exits with code 2.
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
    """The end of an error message about a wrong name: the most similar allowed name, and all allowed names."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Allowed: {', '.join(allowed)}."


def is_own_mistake(error: BaseException) -> bool:
    """Whether `error` comes from a mistake in hf_slim's code: it has such a type, and hf_slim's code raised it.

    A function that turns all errors of a host library into a SlimError calls this first, so that a mistake in hf_slim
    is not reported as a damaged file or an illegal size.

    Args:
        error: The caught error, with its traceback. If the host library raised it, it is not a mistake in hf_slim;
            if hf_slim's code raised it while the library called it, it is.
    """
    if not isinstance(error, MISTAKES):
        return False
    ours = [_is_ours(frame.f_globals) for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = ours.index(False) if False in ours else len(ours)  # the first frame of the host library
    return inside == len(ours) or any(ours[inside:])


def _is_ours(names: dict[str, object]) -> bool:
    return str(names.get("__name__", "")).partition(".")[0] == __name__.partition(".")[0]
