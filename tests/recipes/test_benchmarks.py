"""Every benchmark script runs to its end on tiny models, and so does the recipe that is a script."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.scripts import BENCHMARKS, ROOT, SCRIPTS

pytestmark = pytest.mark.slow
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "TOKENIZERS_PARALLELISM": "false",
}


def run(*command: object, folder: Path) -> str:
    """The output of a script that has to end well; `folder` takes its temporary files."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | ENVIRONMENT | {"TMPDIR": str(folder), "HF_DATASETS_CACHE": str(folder / "datasets")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def committed() -> dict[str, str]:
    return {path.name: path.read_text() for path in (BENCHMARKS / "results").glob("*")}


def test_there_are_twelve_scripts():
    assert len(SCRIPTS) == 12


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_smoke_run_measures_something_and_leaves_the_committed_results(script, tmp_path):
    before = committed()
    output = run(script, "--smoke", folder=tmp_path)
    rows = re.fullmatch(r"Smoke run: (\d+) rows of results in \d files\.", output.splitlines()[-1])
    assert int(rows[1]) > 0
    assert committed() == before
    assert not list(tmp_path.glob("hf_slim-*"))  # its temporary folder


def test_the_network_of_plain_pytorch_trains_and_loads_back(tmp_path):
    output = run(ROOT / "recipes/general/simple_net.py", "--epochs", 1, "--output", tmp_path / "net", folder=tmp_path)
    assert "bit for bit the same" in output
    assert "DIFFERENT" not in output


def test_committed_results_name_no_folder_of_a_machine():
    for name, text in committed().items():
        assert json.loads(text)["runs"], name
        assert not any(start in text for start in ("/home/", "/root/", "/tmp/")), name
