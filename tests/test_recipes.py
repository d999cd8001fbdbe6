"""Every recipe that is shipped is valid and plans to the end."""

from pathlib import Path

import pytest

from hf_slim.recipe import load_recipe
from hf_slim.workflows.plan import describe_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_every_recipe_was_found():
    """Without it a folder that moved would leave nothing to plan, and nothing to fail."""
    assert len(RECIPES) == 14


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_plans(path, request, monkeypatch):
    if "$HF_SLIM_DATA" in path.read_text():
        monkeypatch.setenv("HF_SLIM_DATA", str(request.getfixturevalue("shared_data").resolve()))
    recipe = load_recipe(path)
    plan = describe_recipe(recipe)
    assert recipe.model in plan
    for stage in recipe.runs:
        for technique in stage.techniques:
            assert technique in plan
