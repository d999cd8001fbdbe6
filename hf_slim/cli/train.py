"""hf-slim train: runs a recipe."""

import argparse
from typing import Any

HELP = """\
Runs a recipe: fine-tunes the model with the techniques it names, saves the small model, loads it back in a fresh
process and measures it against the base. Writes report.json, report.md, report.png and a card into the model's folder.

  hf-slim train recipes/quickstart.yaml --dry-run                     print the plan, change nothing
  hf-slim train recipes/quickstart.yaml --set training.max_steps=20   replace values of the recipe
"""


def add(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("train", help="run a recipe", description=HELP, **style)
    parser.add_argument("recipe", help="a YAML file, see recipes/, or the report.json of a run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a value of the recipe"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan; change nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished model in the output folder")
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints the plan of a recipe, or runs it and prints the report."""
    from hf_slim.recipe import load_recipe
    from hf_slim.workflows import plan, report, train

    recipe = load_recipe(options.recipe, options.set)
    if options.dry_run:
        print(plan.dry_run(recipe, options.overwrite))
        return
    found = train.run(recipe, overwrite=options.overwrite, resume=options.resume)
    print(f"\n{report.as_text(found)}\n\nNext:")
    for command in report.next_commands(recipe, found, options.recipe):
        print(f"  {command}")
