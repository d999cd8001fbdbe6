"""hf-slim card: writes the card of a model."""

import argparse
from pathlib import Path
from typing import Any

HELP = """\
Writes README.md, the card of a model, from the report.json in its folder: every number in it was measured. `hf-slim
train` does this for its result; `hf-slim eval` writes a report for any other model.

  hf-slim card runs/quickstart
"""


def add(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("card", help="write the card of a model", description=HELP, **style)
    parser.add_argument("folder", type=Path, help="a folder with report.json")
    parser.add_argument("--overwrite", action="store_true", help="replace a card that somebody has edited")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints where the card is."""
    from hf_slim.workflows.hub.card import write_card

    print(f"Written: {write_card(options.folder, options.overwrite)}")
