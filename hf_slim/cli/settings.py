"""hf-slim settings: explains the settings of a recipe."""

import argparse
from typing import Any

HELP = """\
Lists the settings of a recipe, or of one section, with their types, defaults and meaning.

  hf-slim settings
  hf-slim settings pruning
"""


def add(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("settings", help="explain the settings of a recipe", description=HELP, **style)
    parser.add_argument("section", nargs="?", metavar="SECTION", help="one section, such as pruning (default: all)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints the settings of a section."""
    from hf_slim.workflows.settings import describe_settings

    print(describe_settings(options.section))
