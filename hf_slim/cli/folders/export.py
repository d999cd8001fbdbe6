"""hf-slim export: writes a finished model for other runtimes."""

import argparse
from pathlib import Path
from typing import Any

HELP = """\
Writes a finished model as a file that another runtime loads without hf_slim, with exactly the values that were
trained, and reads it back to prove that. A format that cannot hold them is refused, with what it can hold.

  hf-slim export runs/small --to gguf
  hf-slim export runs/small --to all --output runs/exports
"""


def add(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("export", help="write a model for other runtimes", description=HELP, **style)
    parser.add_argument("model", help="a folder that was trained, a Hub id, or package:<module>/<file>")
    parser.add_argument(
        "--to",
        nargs="+",
        required=True,
        metavar="TARGET",
        help="gguf, onnx, openvino, torch_export, or all; several may be given",
    )
    parser.add_argument("--output", type=Path, help="folder for the files (default: <model>-<target>)")
    parser.add_argument("--allow-rounding", action="store_true", help="round weights that the format cannot hold")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in the output folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints size, path and command of every export, and what was compared."""
    from hf_slim.integration.loading import display_name
    from hf_slim.workflows.folders.export import ALL, as_text, export_model

    to = ALL if ALL in options.to else options.to
    beside = Path(options.model) if Path(options.model).is_dir() else Path(display_name(options.model))
    name = ALL if to == ALL else "-".join(options.to)
    output = options.output or beside.with_name(f"{beside.name}-{name}")
    report = export_model(options.model, output, to, None, options.allow_rounding, options.overwrite)
    print(f"\n{as_text(report)}")
