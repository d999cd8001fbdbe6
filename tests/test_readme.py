"""README and the guides: their Python runs as it stands, in order, on tiny models; their commands and paths exist."""

import argparse
import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_slim.core.registry import Registry
from hf_slim.distillation.losses.divergences import DIVERGENCES
from hf_slim.distillation.losses.hidden_states import HIDDEN_LOSSES
from hf_slim.distillation.teachers.live import freeze_
from hf_slim.export.targets import EXPORTERS
from hf_slim.pruning.importance.criteria import CRITERIA
from hf_slim.quantization.grids.grid import GRIDS
from tests import tiny
from tests.documents import PAGES, README, ROOT, commands, named, prose, snippets
from tests.export import models as export_models

REGISTRIES: list[Registry] = [CRITERIA, DIVERGENCES, HIDDEN_LOSSES, GRIDS, EXPORTERS]
SNIPPETS = {  # how many blocks of Python a page has: none may get lost
    "README.md": 3, "docs/quickstart.md": 3, "docs/guides/quantization.md": 3, "docs/guides/pruning.md": 5,
    "docs/guides/distillation.md": 4, "docs/guides/recipes.md": 2, "docs/guides/students-and-vocabulary.md": 1,
    "docs/guides/exporting.md": 1,
    "docs/guides/saving-and-loading.md": 2,
    "docs/guides/sharing.md": 2,
    "docs/extending/criterion.md": 3, "docs/extending/grid.md": 4, "docs/extending/loss.md": 4,
    "docs/extending/exporter.md": 2, "docs/extending/family.md": 2,
}  # fmt: skip
PATHS = re.compile(r"(?<![\w/.])(?:recipes|hf_slim|tests|docs)/[\w./-]*\w")
FILES = re.compile(r"`(\w[\w-]*\.(?:toml|txt|md|yml))`")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    from hf_slim.cli import main

    return main._parser()


@pytest.fixture
def names(tmp_path, monkeypatch) -> Iterator[dict[str, Any]]:
    """What a reader of a page has: a model, data and arguments, all tiny, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    tiny.save_base(tmp_path / "base")
    tiny.bert().save_pretrained(tmp_path / "google-bert" / "bert-base-uncased")
    args = TrainingArguments(
        "run", max_steps=6, use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2, logging_steps=2
    )
    batches = [{"input_ids": tiny.tokens(2, seed=i), "labels": tiny.tokens(2, seed=i)} for i in range(3)]
    chats = Dataset.from_dict({"prompt": ["one and "] * 8, "completion": ["two"] * 8})
    gc.freeze()  # the Trainer collects garbage, which takes seconds where all libraries are loaded
    yield {
        "model": AutoModelForCausalLM.from_pretrained("base"), "args": args, "data": tiny.text_data(),
        "batches": batches, "sentences": tiny.class_data(), "chats": chats, "base_model": tiny.llama(),
        "student": AutoModelForCausalLM.from_pretrained("base"), "teacher": freeze_(tiny.llama(seed=7)),
    }  # fmt: skip
    gc.unfreeze()


def test_every_snippet_is_counted():
    found = {named(page): len(snippets(page, "python")) for page in PAGES}
    assert {page: count for page, count in found.items() if count} == SNIPPETS


@pytest.mark.parametrize("page", [name for name in SNIPPETS if "extending" in name or "students" in name])
def test_the_snippets_of_a_page_run(page, names):
    for snippet in snippets(ROOT / page, "python"):
        exec(snippet, names)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_snippets_of_the_first_pages_do_what_they_say(page, names):
    trains, loads, prepares = snippets(ROOT / page, "python")
    exec(trains, names)
    trained = tiny.logits(names["model"])
    assert names["model"].model.layers[0].mlp.up_proj.out_features < 64
    exec(loads, names)
    assert torch.equal(tiny.logits(names["model"]), trained)
    names["model"] = AutoModelForCausalLM.from_pretrained("base")
    exec(prepares, names)
    assert names["model"].lm_head.weight.dtype == torch.float32
    assert names["model"].model.layers[0].mlp.up_proj.weight.dtype == torch.int8


def test_the_snippets_of_quantization_do_what_they_say(names):
    trains, spells_out, adapts = snippets(ROOT / "docs/guides/quantization.md", "python")
    exec(trains, names)
    assert names["model"].model.embed_tokens.weight.dtype == torch.int8
    exec(spells_out, names)
    assert names["config"].linear_scheme().weights.zero_point == 127
    exec(adapts, names)
    loaded = AutoModelForCausalLM.from_pretrained("small-merged")
    assert torch.equal(tiny.logits(loaded), tiny.logits(names["small"]))


def test_the_snippets_of_pruning_do_what_they_say(names):
    trains, prunes_heads, loads, at_once, again = snippets(ROOT / "docs/guides/pruning.md", "python")
    exec(trains, names)
    assert AutoModelForCausalLM.from_pretrained("small").config.intermediate_size == 32
    exec(prunes_heads, names)
    exec(loads, names)
    heads = [layer.attention.self.num_attention_heads for layer in names["small"].bert.encoder.layer]
    assert sum(heads) == 4  # of eight
    exec(at_once, names)
    assert names["small"].config.intermediate_size == 24
    before = tiny.logits(names["trainer"].model)
    exec(again, names)
    assert not torch.equal(tiny.logits(names["trainer"].model), before)


def test_the_snippets_of_distillation_train(names):
    names["Trainer"] = Trainer
    before = tiny.logits(names["student"])
    for snippet in snippets(ROOT / "docs/guides/distillation.md", "python"):
        exec(snippet, names)
        after = tiny.logits(names["student"])
        assert not torch.equal(after, before)
        assert any("loss_distill" in entry for entry in names["trainer"].state.log_history)
        before = after


def test_the_snippet_of_exporting_writes_a_file(names, capsys):
    pytest.importorskip("gguf", reason="needs the package gguf")
    (writes,) = snippets(ROOT / "docs/guides/exporting.md", "python")
    names |= {"model": export_models.llama(), "tokenizer": export_models.byte_level()}
    exec(writes, names)
    assert capsys.readouterr().out.startswith("small-gguf/model.gguf ")


def test_the_snippet_of_a_recipe_plans(names):
    plans, runs = snippets(ROOT / "docs/guides/recipes.md", "python")
    Path("texts.txt").write_text("".join(f"{number} and two, three and four\n" for number in range(80)))
    exec(plans, names)
    assert names["recipe"].techniques["pruning"].sparsity == {"ffn": 0.25}
    assert callable(names["run"])
    assert runs.startswith("report = run(recipe)")  # as `hf-slim train` does, which has tests of its own


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_line_parses(page):
    for words in commands(page):
        assert callable(parser().parse_args(words).run), words


def test_every_command_is_shown_somewhere():
    verbs = {words[0] for page in PAGES for words in commands(page)}
    listed = set(re.findall(r"^\| `hf-slim ([\w-]+)` \|", README.read_text("utf-8"), re.MULTILINE))
    assert verbs == listed == set(re.search(r"\{(.*?)\}", parser().format_usage())[1].split(","))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_in_a_sentence_exists(page):
    for verb in re.findall(r"`hf-slim ([a-z-]+)", prose(page)):
        with pytest.raises(SystemExit) as stop:
            parser().parse_args([verb, "--help"])
        assert stop.value.code == 0, verb


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_path_that_is_named_exists(page):
    text = page.read_text("utf-8")
    for path in {*PATHS.findall(text)} - {*re.findall(r"\]\(([^)#]+)", text)}:
        assert (ROOT / path).exists(), path
    for path in FILES.findall(prose(page)):
        assert (ROOT / path).is_file() or path in ("report.md",), path


def test_the_make_targets_that_are_named_exist():
    targets = {target for page in PAGES for target in re.findall(r"\bmake ([a-z-]+)\b", page.read_text("utf-8"))}
    assert {"quickstart", "test", "lint", "docs", "reference"} <= targets
    for target in targets & {"quickstart", "test", "lint", "docs", "reference", "tables", "cards"}:
        assert f"\n{target}:" in (ROOT / "Makefile").read_text("utf-8"), target


def test_the_readme_is_short():
    assert README.read_text("utf-8").count("\n") <= 150
