"""How much a command prints while it runs: progress bars, logs, and messages of other libraries."""

import logging

import datasets
import transformers

from hf_slim.progress import print_above_bars, show_progress

QUIET, NORMAL, VERBOSE = "quiet", "normal", "verbose"
_now = {"level": NORMAL}


class _AboveBars(logging.Handler):
    """Prints records on stderr, above the progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print_above_bars(self.format(record))


_HANDLER = _AboveBars()
_HANDLER.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))


def set_verbosity(level: str = NORMAL) -> None:
    """Sets how much this process prints. For programs: it also silences transformers, datasets and bitsandbytes.

    Args:
        level: "quiet": warnings only, no progress bars; "normal": progress bars and warnings; "verbose": also a log
            line at the start of every long step, and the warnings of transformers.
    """
    _now["level"] = level
    show_progress(level != QUIET)
    log = logging.getLogger("hf_slim")
    log.setLevel(logging.INFO if level == VERBOSE else logging.WARNING)
    if _HANDLER not in log.handlers:
        log.addHandler(_HANDLER)
    quiet_libraries()
    if level == QUIET:
        datasets.disable_progress_bars()
    if level == VERBOSE:
        transformers.utils.logging.set_verbosity_warning()


def verbosity() -> str:
    """The current level of `set_verbosity`."""
    return _now["level"]


def quiet_libraries() -> None:
    """Turns off progress bars and warnings of other libraries."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    """False for the warning of bitsandbytes that an optional kernel from the Hub is missing."""
    return "kernels-community" not in record.getMessage()
