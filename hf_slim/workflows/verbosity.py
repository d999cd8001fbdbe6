"""What a command shows while it works: progress bars, logs, and what other libraries print."""

import logging

import datasets
import transformers

from hf_slim.progress import print_above_bars, show_progress

QUIET, NORMAL, VERBOSE = "quiet", "normal", "verbose"
_now = {"level": NORMAL}


class _AboveBars(logging.Handler):
    """Prints records on stderr, above the progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        print_above_bars(self.format(record))


_HANDLER = _AboveBars()
_HANDLER.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))


def set_verbosity(level: str = NORMAL) -> None:
    """Chooses what this process shows, and silences the libraries below. For programs, not for use as a library.

    Args:
        level: "quiet": warnings only, no progress bars; "normal": progress bars and warnings; "verbose": also a log
            line where a long step starts, and the warnings of transformers.
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
    """The level that `set_verbosity` was last given."""
    return _now["level"]


def quiet_libraries() -> None:
    """Leaves the terminal to hf_slim's own progress bars."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    """False for a warning of bitsandbytes, in every process, that an optional kernel from the Hub is missing."""
    return "kernels-community" not in record.getMessage()
