"""The command line `hf-slim`: assembles the verbs, parses, and turns errors into exit codes."""

import argparse
import sys
import tempfile
import traceback
from typing import Any

from hf_slim.cli import cache_teacher, evaluate, sensitivity, settings, train
from hf_slim.cli.folders import convert, export, inspect, make_student, shrink_vocabulary, verify
from hf_slim.cli.hub import card, push
from hf_slim.core.errors import SlimError
from hf_slim.version import __version__

VERBS = (
    train, inspect, evaluate, sensitivity, shrink_vocabulary, make_student, cache_teacher, convert, export, card, push,
    verify, settings,
)  # fmt: skip
DONE, UNEXPECTED, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit codes


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Command-line arguments without the name of the program; None: those of this process.
    Returns: 0 on success; 2, with one paragraph on stderr, for an error that the user can fix; 130 if interrupted;
        1 for an unexpected error.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return REFUSED
    if options.quiet and options.verbose:
        parser.error("--quiet and --verbose exclude each other: give one of them")
    try:
        from hf_slim.workflows.verbosity import set_verbosity

        set_verbosity("quiet" if options.quiet else "verbose" if options.verbose else "normal")
        options.run(options)
    except KeyboardInterrupt:
        print("hf-slim: interrupted. A finished model, if there was one, is unchanged.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _explain(error, options.traceback)
    return DONE


def _explain(error: Exception, with_traceback: bool) -> int:
    """Prints an error as one paragraph, after its traceback with `--traceback`. Returns the exit code."""
    if with_traceback:
        traceback.print_exception(error)
    if isinstance(error, SlimError):
        print(f"hf-slim: {error}", file=sys.stderr)
        return REFUSED
    if isinstance(error, OSError):
        print(f"hf-slim: {error}. Check the path, its permissions and the free space.", file=sys.stderr)
        return REFUSED
    where = "above" if with_traceback else f"in {_written_traceback(error)}"
    print(
        f"hf-slim: unexpected {type(error).__name__}: {error}. Please report it, with the traceback {where}.",
        file=sys.stderr,
    )
    return UNEXPECTED


def _written_traceback(error: Exception) -> str:
    """A file with the traceback, so that a long run need not be repeated to see it."""
    with tempfile.NamedTemporaryFile("w", prefix="hf-slim-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    return file.name


def _parser() -> argparse.ArgumentParser:
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    text = "Fine-tune a Transformers model and get a small one."
    parser = argparse.ArgumentParser(prog="hf-slim", description=text, parents=[_for_every_verb(False)], **style)
    commands = parser.add_subparsers(title="commands")
    # SUPPRESS: the defaults of a verb do not override options that are given before it
    style["parents"] = [_for_every_verb(argparse.SUPPRESS)]
    for verb in VERBS:
        verb.add(commands, style)
    return parser


def _for_every_verb(default: Any) -> argparse.ArgumentParser:
    """Options that are allowed before and after the verb."""
    parser = argparse.ArgumentParser(add_help=False)
    for name, text in (
        ("--quiet", "show no progress bars, only warnings and the result"),
        ("--verbose", "also print a line when a long step starts"),
        ("--traceback", "print the traceback of an error"),
    ):
        parser.add_argument(name, action="store_true", default=default, help=text)
    parser.add_argument("--version", action="version", version=f"hf-slim {__version__}")
    return parser
