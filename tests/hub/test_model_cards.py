"""The cards of this project's own models are what their reports give."""

import json
from pathlib import Path

import pytest

from hf_slim.hub.card import render_card
from hf_slim.hub.folder import PICTURE, read_report
from hf_slim.recipe import load_recipe

CARDS = Path(__file__).parents[2] / "model_cards"
FOLDERS = sorted(path.parent for path in CARDS.glob("*/report.json"))


def test_every_folder_has_a_report():
    assert sorted(path for path in CARDS.iterdir() if path.is_dir()) == FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_card_is_what_its_report_gives(folder):
    made = render_card(read_report(folder), folder.name, (folder / PICTURE).is_file())
    assert (folder / "README.md").read_bytes() == made.encode(), f"{folder} is out of date: run `make cards`"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_report_is_a_recipe_that_can_be_run_again(folder):
    recipe = load_recipe(folder / "report.json", ["output=again"])
    kept = read_report(folder)["recipe"]
    assert_within(kept | {"output": "again"}, json.loads(json.dumps(recipe.to_dict())))


def assert_within(kept: dict, found: dict) -> None:
    """Everything that was said then is said now; settings that came later have their defaults."""
    for name, value in kept.items():
        if isinstance(value, dict) and isinstance(found[name], dict):
            assert_within(value, found[name])
        else:
            assert found[name] == value, name
