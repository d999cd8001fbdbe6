"""Results of benchmarks: rows keep the record of the run that measured them, and an interrupted run goes on."""

import json

import pytest
from harness import provenance
from harness.results import Results, load, values_of


@pytest.fixture(autouse=True)
def records(monkeypatch):
    """Runs that differ by their commit: "commit 1", "commit 2", ..."""
    commits = iter(f"commit {number}" for number in range(1, 9))
    monkeypatch.setattr(provenance, "commit", lambda: next(commits))
    monkeypatch.setattr(provenance.sys, "argv", [str(provenance.ROOT / "recipes/benchmarks/some_script.py")])


def commits_of(path):
    content = load(path)
    return {name: content["runs"][row["run"]]["commit"] for name, row in content["rows"].items()}


def test_a_row_is_measured_once_and_a_later_run_goes_on(tmp_path):
    path, calls = tmp_path / "speed.json", []

    def measure(value):
        calls.append(value)
        return {"perplexity": value}

    first = Results(path, {"steps": 3}, seeds=[1])
    first("a", lambda: measure(1.0))
    second = Results(path, {"steps": 3}, seeds=[2])
    assert second("a", lambda: measure(9.0)) == {"perplexity": 1.0}
    second("b", lambda: measure(2.0))
    assert calls == [1.0, 2.0]
    assert commits_of(path) == {"a": "commit 1", "b": "commit 2"}
    assert [run["seeds"] for run in load(path)["runs"]] == [[1], [2]]


def test_again_replaces_rows_and_forgets_runs_that_have_none_left(tmp_path):
    path = tmp_path / "speed.json"
    Results(path, {})("a", lambda: {"ms": 1})
    again = Results(path, {}, again=True)
    again("a", lambda: {"ms": 2})
    again("a", lambda: {"ms": 3})  # once in this run is enough
    assert values_of(load(path)) == {"a": {"ms": 2}}
    assert commits_of(path) == {"a": "commit 2"}
    assert len(load(path)["runs"]) == 1


def test_rows_measured_together_are_kept_together(tmp_path):
    results = Results(tmp_path / "speed.json", {})
    results("a", lambda: {"ms": 1})
    results.together(["a", "b"], lambda: {"a": {"ms": 5}, "b": {"ms": 6}})  # one is missing: both are timed in turn
    assert results.values() == {"a": {"ms": 5}, "b": {"ms": 6}}
    with pytest.raises(ValueError, match=r"Measured the rows \['c'\], expected \['d'\]"):
        results.together(["d"], lambda: {"c": {}})


def test_other_settings_are_refused(tmp_path):
    Results(tmp_path / "speed.json", {"steps": 3, "sizes": (1, 2)})("a", dict)
    Results(tmp_path / "speed.json", {"steps": 3, "sizes": (1, 2)})  # a tuple reads back as a list
    with pytest.raises(SystemExit, match="other settings"):
        Results(tmp_path / "speed.json", {"steps": 4, "sizes": (1, 2)})


def test_a_file_of_another_version_is_refused(tmp_path):
    path = tmp_path / "speed.json"
    path.write_text(json.dumps({"schema_version": 0}))
    with pytest.raises(ValueError, match="has version 0"):
        Results(path, {})


def test_the_record_names_versions_and_no_folder():
    record = provenance.record_of_run([1], ["torch", "no-such-package"])
    assert record["command"] == "python recipes/benchmarks/some_script.py"
    assert "no-such-package" not in record["versions"]
    assert {"python", "torch", "transformers", "hf_slim"} <= record["versions"].keys()
    assert record["machine"]["cores"] >= 1


def test_a_command_is_shown_without_folders_of_the_machine():
    script = str(provenance.ROOT / "recipes/benchmarks/some_script.py")
    given = [script, "--results", "/somewhere/else", "--steps", "3", "--dense", "/somewhere/model", "--results=/x"]
    assert provenance.command(given) == "python recipes/benchmarks/some_script.py --steps 3 --dense model"
