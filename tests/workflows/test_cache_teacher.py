"""The teacher of a recipe, stored: from YAML to a folder that the same recipe trains on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_slim import SlimError
from hf_slim.cli.main import main
from hf_slim.distillation.store import writer as storing
from hf_slim.distillation.store.format import tokenizer_hash
from hf_slim.distillation.store.reader import StoredTeacher
from hf_slim.evaluation.tasks.task import TASKS
from hf_slim.recipe import Recipe, load_recipe
from hf_slim.workflows import cache_teacher, train
from tests import tiny
from tests.workflows.test_classifier_recipe import recipe_file as classifier_recipe  # noqa: F401  a fixture
from tests.workflows.test_train import recipe_file  # noqa: F401  a fixture

ROOT = Path(__file__).parents[2]


def stored(recipe_file: Path, name: str = "store", **arguments: object) -> StoredTeacher:  # noqa: F811
    folder = recipe_file.parent / name
    cache_teacher.cache_teacher(load_recipe(recipe_file), folder, k=8, **arguments)
    return StoredTeacher.open(folder)


def training_data(recipe: Recipe) -> tuple[dict[str, torch.Tensor], object]:
    """All examples that the recipe trains on as one batch, and the dataset they come from."""
    model, tokenizer, _ = train.load_base(recipe)
    data = train.training_examples(recipe, tokenizer, model.config.label2id, recipe.training_arguments(recipe.output))
    return TASKS[recipe.task].collator(tokenizer)(list(data)), data


def test_a_recipe_becomes_a_store_of_what_its_teacher_answers(recipe_file, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "out" / "small.teacher"
    assert main(["cache-teacher", str(recipe_file), "--k", "8"]) == 0
    out = capsys.readouterr().out
    assert "8 different examples, 128 tokens, for training with 1 process" in out
    assert f"hf-slim train {recipe_file} --set distillation.teacher={folder}" in out
    assert "mass: 8 of 96 classes stored" in out
    assert sorted(path.name for path in folder.parent.iterdir()) == ["small.teacher"]

    store, recipe = StoredTeacher.open(folder), load_recipe(recipe_file)
    inputs, data = training_data(recipe)
    assert store.check_data(data) == 8
    store.check(96, tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path / "base")), 1.0)
    _, found = store.top_k(inputs)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    best = torch.log_softmax(tiny.logits(model, inputs["input_ids"]).double(), -1).topk(8).values.flatten(0, 1)
    assert (found - best).abs().max() < 3e-3
    with pytest.raises(SlimError, match="cache-teacher"):
        store.check_data(training_data(load_recipe(recipe_file, ["training.seed=7"]))[1])


def test_a_classifier_has_one_answer_per_example(classifier_recipe, tmp_path, capsys):  # noqa: F811
    teacher = tmp_path / "teacher"
    tiny.bert(seed=5, num_labels=2).save_pretrained(teacher)
    tiny.tokenizer().save_pretrained(teacher)
    settings = ["pruning=null", "distillation={teacher: " + str(teacher) + "}", "training.max_steps=8"]
    overrides = [part for setting in settings for part in ("--set", setting)]
    assert main(["cache-teacher", str(classifier_recipe), "--output", str(tmp_path / "store"), *overrides]) == 0
    assert "100.00% of the probability mass: 2 of 2 classes stored" in capsys.readouterr().out
    store = StoredTeacher.open(tmp_path / "store")
    assert (store.info.per, store.info.k, store.info.teacher) == ("example", 2, str(teacher))
    inputs, data = training_data(load_recipe(classifier_recipe, settings))
    assert store.check_data(data) == 32
    ids, found = store.top_k(inputs)
    labels = inputs.pop("labels")
    assert ids.shape == (len(labels), 2)
    with torch.no_grad():
        logits = AutoModelForSequenceClassification.from_pretrained(teacher)(**inputs).logits
    assert (found - torch.log_softmax(logits, -1).gather(1, ids)).abs().max() < 2e-3


def test_an_interrupted_run_goes_on_to_the_same_store(recipe_file, tmp_path, monkeypatch):  # noqa: F811
    whole = stored(recipe_file, "whole")
    calls = []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return asked(*arguments)

    asked = cache_teacher._run_teacher
    with monkeypatch.context() as broken:
        broken.setattr(cache_teacher, "_run_teacher", killed)
        with pytest.raises(KeyboardInterrupt):
            stored(recipe_file)
    assert not (tmp_path / "store").exists()
    with pytest.raises(SlimError, match=r"interrupted.*--resume"):
        stored(recipe_file)
    calls.clear()
    with monkeypatch.context() as counted:
        counted.setattr(cache_teacher, "_run_teacher", lambda *arguments: calls.append(1) or asked(*arguments))
        resumed = stored(recipe_file, resume=True)
    assert len(calls) == 3  # the probe and two of four batches
    assert not (tmp_path / "store.partial").exists()
    inputs, _ = training_data(load_recipe(recipe_file))
    for one, other in zip(whole.top_k(inputs), resumed.top_k(inputs), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(SlimError, match=r"already holds.*--overwrite"):
        stored(recipe_file, resume=True)
    stored(recipe_file, overwrite=True)
    assert not (tmp_path / "store.replaced").exists()


def test_a_resumed_run_must_ask_the_same_teacher(recipe_file, tmp_path, monkeypatch):  # noqa: F811
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(cache_teacher, "finish_store", killed)
        with pytest.raises(KeyboardInterrupt):
            stored(recipe_file)
    tiny.llama(seed=4).save_pretrained(tmp_path / "base")
    with pytest.raises(SlimError, match="made with teacher_hash"):
        stored(recipe_file, resume=True)
    stored(recipe_file, overwrite=True)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["distillation=null"], "no `distillation` section"),
        (["distillation.teacher=no/such/model"], "could not be loaded"),
        (["distillation.teacher=STORE"], "already a stored teacher"),
        (["distillation.teacher=[self, BASE]"], "names 2"),
        (["stages=[{distillation: null}, {}]"], "Stage 2 has the teacher 'self'"),
        (
            ["distillation.teacher=BASE", "stages=[{}, {distillation: {teacher: BASE, temperature: 2}}]"],
            "different teachers",
        ),
    ],
)
def test_a_recipe_without_a_teacher_to_store_is_refused(recipe_file, tmp_path, capsys, overrides, says):  # noqa: F811
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "teacher.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    texts = [
        text.replace("BASE", str(tmp_path / "base")).replace("STORE", str(tmp_path / "store")) for text in overrides
    ]
    arguments = [part for text in ["quantization=null", *texts] for part in ("--set", text)]
    code = main(["cache-teacher", str(recipe_file), *arguments])
    captured = capsys.readouterr()
    assert code == 2
    assert says in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_another_vocabulary_and_a_full_disk_are_refused(recipe_file, tmp_path, monkeypatch):  # noqa: F811
    tiny.llama(vocab_size=90).save_pretrained(tmp_path / "other")
    recipe = load_recipe(recipe_file, [f"distillation.teacher={tmp_path / 'other'}"])
    with pytest.raises(SlimError, match="another vocabulary"):
        cache_teacher.cache_teacher(recipe)
    monkeypatch.setattr(cache_teacher.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(SlimError, match="Lower --k"):
        stored(recipe_file)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(SlimError, match="other files"):
        stored(recipe_file, "thesis", overwrite=True)


def test_stages_share_a_teacher_and_a_trimmed_vocabulary(recipe_file, tmp_path):  # noqa: F811
    base = tmp_path / "base"
    recipe = load_recipe(
        recipe_file,
        ["quantization=null", "distillation=null", "stages=[{}, " + f"{{distillation: {{teacher: {base}}}}}]"],
    )
    report = cache_teacher.cache_teacher(recipe, tmp_path / "staged")
    assert report["examples"] == 8
    assert cache_teacher.next_settings(recipe, "x") == ["stages.2.distillation.teacher=x"]
    trimmed = load_recipe(recipe_file, ["vocabulary={round_to: 8}"])
    report = cache_teacher.cache_teacher(trimmed, tmp_path / "trimmed")
    assert report["n_classes"] < 96


@pytest.mark.slow
def test_two_processes_store_what_one_does(recipe_file, tmp_path):  # noqa: F811
    whole = tmp_path / "whole"
    recipe = load_recipe(recipe_file, ["training.max_steps=8"])  # twice the steps, half the processes
    cache_teacher.cache_teacher(recipe, whole, k=8)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, "-m", "hf_slim.cli", "cache-teacher", str(recipe_file), "--k", "8", "--output", tmp_path / "two"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("16 different examples, 256 tokens, for training with 2 processes") == 1
    one, two = StoredTeacher.open(whole), StoredTeacher.open(tmp_path / "two")
    assert {path.name for path in storing.shards_in(tmp_path / "two")} == {
        "shard-0-0.safetensors",
        "shard-1-0.safetensors",
    }
    assert one.manifest["data_fingerprint"] == two.manifest["data_fingerprint"]
    inputs, _ = training_data(recipe)
    for mine, theirs in zip(one.top_k(inputs), two.top_k(inputs), strict=True):
        assert torch.equal(mine, theirs)
