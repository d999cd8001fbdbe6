"""Whatever a workflow does with its data, it reads, splits and hashes the source once."""

import pytest

from hf_slim import data, load_recipe
from hf_slim.workflows import cache_teacher, evaluate, plan, train
from tests.workflows.test_classifier_recipe import recipe_file as classifier_recipe  # noqa: F401  a fixture
from tests.workflows.test_train import recipe_file  # noqa: F401  a fixture


@pytest.fixture
def reads(monkeypatch):
    """Names of the functions that read or split a source, each time that one is called; measuring in this process."""
    calls = []

    def count(name, original):
        return lambda *arguments, **keywords: calls.append(name) or original(*arguments, **keywords)

    for name in ("load_dataset", "_split"):
        monkeypatch.setattr(data, name, count(name, getattr(data, name)))
    monkeypatch.setattr(evaluate, "in_fresh_process", lambda function, *arguments: function(*arguments))
    return calls


@pytest.mark.parametrize(
    "changes", [[], ["vocabulary={round_to: 8}"], ["stages=[{pruning: null, quantization: null}, {}]"]]
)
def test_a_run_reads_its_data_once(recipe_file, reads, changes):  # noqa: F811
    report = train.run(load_recipe(recipe_file, changes))
    assert report["result"]["training"]["step_ms"]["median"] > 0
    assert reads == ["load_dataset", "_split"]


def test_a_run_of_a_classifier_reads_its_data_once(classifier_recipe, reads):  # noqa: F811
    report = train.run(load_recipe(classifier_recipe))
    assert "never trained" in report["notes"][0]
    assert reads == ["load_dataset", "_split"]


def test_stages_with_data_of_their_own_read_each_source_once(recipe_file, tmp_path, reads):  # noqa: F811
    other = tmp_path / "other.jsonl"
    other.write_bytes((tmp_path / "data.jsonl").read_bytes())
    stages = f"stages=[{{quantization: null, data: {{block_size: 32}}}}, {{data: {{source: {other}}}}}]"
    train.run(load_recipe(recipe_file, [stages]))
    assert reads == ["load_dataset", "_split"] * 2


@pytest.mark.parametrize("workflow", ["dry run", "cache-teacher", "eval"])
def test_the_other_workflows_read_their_data_once(workflow, recipe_file, tmp_path, reads):  # noqa: F811
    if workflow == "dry run":
        stages = "stages=[{quantization: null}, {}]"
        plan.dry_run(load_recipe(recipe_file, [stages, "vocabulary={round_to: 8}"]))
    elif workflow == "cache-teacher":
        cache_teacher.cache_teacher(recipe_file)
    else:
        base, source = str(tmp_path / "base"), data.DataConfig(str(tmp_path / "data.jsonl"), block_size=16)
        settings = evaluate.EvaluationConfig(blocks=2, prefill_tokens=8, decode_tokens=2, repeats=1, prompt="abc")
        evaluate.evaluate(base, base, source, settings)
    assert reads == ["load_dataset", "_split"]
