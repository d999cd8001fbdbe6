"""hf-slim cache-teacher: stores the predictions of a teacher."""

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

HELP = """\
Runs the teacher of a recipe once over the training examples and stores its most probable predictions, so that training
needs no teacher in memory. Launch it with as many processes as the training. With one process instead of N, multiply
`training.max_steps` by N.

  hf-slim cache-teacher recipes/distill.yaml
  torchrun --nproc-per-node 2 -m hf_slim.cli cache-teacher recipes/distill.yaml --resume
"""


def add(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("cache-teacher", help="store a teacher's predictions", description=HELP, **style)
    parser.add_argument("recipe", help="a YAML file with a `distillation` section")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a value of the recipe"
    )
    parser.add_argument("--output", type=Path, help="folder of the store (default: the recipe's output + .teacher)")
    parser.add_argument("--k", type=int, default=64, help="classes stored of every prediction (default: 64)")
    parser.add_argument("--overwrite", action="store_true", help="replace a store, or delete an interrupted one")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints what was stored and how to train on it."""
    from hf_slim.recipe import load_recipe
    from hf_slim.workflows.cache_teacher import as_text, cache_teacher, next_settings

    recipe = load_recipe(options.recipe, options.set)
    report = cache_teacher(recipe, options.output, options.k, options.overwrite, options.resume)
    if int(os.environ.get("RANK", 0)) != 0:  # every process has the report, the first prints it
        return
    overrides = [*options.set, *next_settings(recipe, report["output"])]
    print(f"\n{as_text(report)}\n\nNext:")
    print(f"  hf-slim train {options.recipe} {' '.join(f'--set {shlex.quote(text)}' for text in overrides)}")
