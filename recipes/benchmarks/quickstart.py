"""The quickstart's numbers: `recipes/quickstart.yaml`, and the same fine-tune without compression, from their reports.

Trains, saves, loads back and measures what `make quickstart` does, in `runs/benchmarks`, and keeps what `report.json`
says of base and result.

    python recipes/benchmarks/quickstart.py                     # 12 minutes on 2 cores
    python recipes/benchmarks/quickstart.py --recipes compressed
"""

import time
from pathlib import Path
from typing import Any

from harness.command import Run, parser_of, run_script
from harness.results import Values

from hf_slim.recipe import Recipe, load_recipe
from hf_slim.workflows.train import run as train

ROOT = Path(__file__).parents[2]
RECIPES = {"compressed": "recipes/quickstart.yaml", "uncompressed": "recipes/benchmarks/quickstart-uncompressed.yaml"}
SIDES = ("base", "result")
SMOKE = {
    "training.max_steps": 3, "evaluation.blocks": 2, "evaluation.repeats": 1, "evaluation.training_repeats": 1,
    "evaluation.prefill_tokens": 16, "evaluation.decode_tokens": 2,
}  # fmt: skip


def recipe_of(name: str, run: Run) -> Recipe:
    """The recipe of that name, with a model in the scratch folder as its output."""
    changes: dict[str, Any] = {"output": run.scratch / "quickstart" / name}
    if run.options.smoke:
        texts = run.inputs.texts
        data = {"data.source": texts.source, "data.block_size": texts.block_size}
        changes |= SMOKE | data | {"model": run.inputs.causal}
    return load_recipe(ROOT / RECIPES[name], [f"{key}={value}" for key, value in changes.items()])


def measured(recipe: Recipe) -> Values:
    """What the report says of base and result, and the minutes from start to report."""
    start = time.perf_counter()
    report = train(recipe, overwrite=True)
    minutes = (time.perf_counter() - start) / 60
    sides = {side: {key: value for key, value in report[side].items() if key != "prompt_and_completion"}
             for side in SIDES}  # fmt: skip
    return sides | {"ratios": report["ratios"], "notes": report["notes"], "minutes": minutes}


def main(run: Run) -> None:
    """Runs every recipe that is missing."""
    recipes = {name: recipe_of(name, run) for name in RECIPES}
    settings = {name: {key: value for key, value in recipe.to_dict().items() if key != "output"}
                for name, recipe in recipes.items()}  # fmt: skip
    seeds = sorted({recipe.training.get("seed", 42) for recipe in recipes.values()})
    results = run.results("quickstart", settings, seeds)
    for name in run.options.recipes:
        results(name, lambda name=name: measured(recipes[name]))


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    run_script(parser, main, smoke={"recipes": ["compressed"]})
