"""hf-slim verify: whether a folder is what was recorded when it was finished."""

import argparse
from typing import Any

HELP = """\
Compares size and SHA-256 of every file of a folder with what hf_slim recorded when it finished the folder, and checks
that config, index and shards agree. README.md, reports, pictures and licences may differ. Nothing is loaded.

  hf-slim verify runs/quickstart
  hf-slim verify runs/edited --record
"""


def add(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("verify", help="check a folder against its checksums", description=HELP, **style)
    parser.add_argument("folder", help="a model that hf_slim finished, or a stored teacher")
    parser.add_argument("--record", action="store_true", help="record the folder as it is now, if you trust it")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints what was compared."""
    from hf_slim.workflows.folders.verify import verify

    found = verify(options.folder, options.record)
    by = f", recorded by hf_slim {found.version}" if found.version else ""
    print(f"{found.folder}: {found.files} files, {found.size_bytes / 1e6:,.1f} MB{by}: nothing differs")
