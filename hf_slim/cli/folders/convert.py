"""hf-slim convert: a packed folder in another format."""

import argparse
from pathlib import Path
from typing import Any

HELP = """\
Writes a packed model in the format of another library, or back. No value changes; a format that cannot hold the
values exactly is refused, with those that can.

  hf-slim convert runs/small --to compressed-tensors
  hf-slim convert runs/small --to slim --output runs/small-again
"""


def add(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("convert", help="write a packed model in another format", description=HELP, **style)
    parser.add_argument("folder", type=Path, help="a folder that hf_slim has saved, packed")
    parser.add_argument(
        "--to", required=True, help="compressed-tensors, gemma, bitsandbytes, slim, or auto: the first that fits"
    )
    parser.add_argument("--output", type=Path, help="folder for the result (default: FOLDER-<format>)")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished model in the output folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints where the result is, its size, and what loads it."""
    from hf_slim.workflows.folders.convert import convert_folder

    report = convert_folder(options.folder, options.to, options.output, options.overwrite)
    sizes = f"weights {report['before'] / 1e6:.1f} MB, now {report['after'] / 1e6:.1f} MB"
    print(f"\nSaved to {report['output']} in format {report['format']}: {sizes}.")
    print(f"It loads in {report['read_by']}.\n\nNext:\n  hf-slim inspect {report['output']}")
