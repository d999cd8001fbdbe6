"""Cards from reports: what they say, what they must not say, and that their snippets load the model."""

import copy
import random
import re

import pytest
import torch
from huggingface_hub import ModelCard

from hf_slim import PruningConfig, QuantizationConfig, SlimError, SlimLoadError, convert, prepare, write_card
from hf_slim.core.report import ROWS, find, ratios, value_of
from hf_slim.hub.card import is_untouched, render_card
from hf_slim.hub.facts import change, quality_interval
from hf_slim.hub.folder import describe_saved
from hf_slim.hub.steps import steps_of
from tests import tiny
from tests.documents import FENCE
from tests.hub.conftest import save_model
from tests.hub.reports import report, spread

FOR_THE_WORSE = ("worse", "slower", "larger")
FOR_THE_BETTER = ("better", "faster", "smaller")


def python_of(card: str) -> list[str]:
    return [code for language, code in FENCE.findall(card) if language == "python"]


@pytest.mark.parametrize("seed", range(5))
def test_the_same_report_gives_the_same_bytes(seed):
    made = report(seed)
    before = copy.deepcopy(made)
    assert render_card(made, "small", True) == render_card(copy.deepcopy(made), "small", True)
    assert made == before
    assert render_card(made, "small") != render_card(report(seed + 100), "small")


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_is_called_a_loss_wherever_it_is_told(seed):
    made = report(seed)
    card = render_card(made, "small")
    headline = next(line for line in card.splitlines() if line.startswith("**"))
    limits = card.partition("## Limits")[2]
    told = 0
    for label, path, _, smaller in ROWS:
        base, result = (value_of(find(made[side], path)) for side in ("base", "result"))
        if base is None:
            continue
        told += 1
        how = re.search(rf"^\| [\w ]+ \| {label}(?:, against a .*)? \|.*\| (.*) \|$", card, re.MULTILINE)[1]
        is_worse = result > base if smaller else result < base
        if abs(result / base - 1) > 0.03:  # more than the spread of the times
            assert how.endswith(FOR_THE_WORSE if is_worse else FOR_THE_BETTER), label
            assert bool(re.search(f"{label}[^;]*: {how}", limits)) == is_worse
            assert (f"{label} {how}" in headline) <= (label in ("prefill", "decode"))
    assert told == 7
    quality = [made[side]["quality"]["perplexity"] for side in ("base", "result")]
    assert f"held-out perplexity {quality[1]:.2f} (base: {quality[0]:.2f}" in headline


@pytest.mark.parametrize("seed", range(10))
def test_times_within_each_others_spread_do_not_differ(seed):
    middle, share = random.Random(seed).uniform(1, 100), random.Random(seed).uniform(0.01, 0.3)
    made = report(seed)
    made["base"]["inference"]["prefill_ms"] = spread(middle, share)
    made["result"]["inference"]["prefill_ms"] = spread(middle * (1 - share), share)
    assert change(made, "prefill") == "within the spread"
    assert "prefill unchanged within the spread" in render_card(made, "small")
    made["result"]["inference"]["prefill_ms"] = spread(middle * (1 - 3 * share), share)
    assert change(made, "prefill").endswith("x faster")


def test_what_the_base_was_is_said():
    made = report()
    assert "It was not fine-tuned on the data" in render_card(made, "small")
    assert "It was fine-tuned on the same data" in render_card(made | {"base_is_tuned": True}, "small")
    note = "The base is the model after stage 1: only fine-tuned. The result was trained on from there."
    assert "It was fine-tuned on the same data" in render_card(made | {"notes": [note]}, "small")
    for text in (
        "files on disk, against a float32 copy",
        "MB as float32)",
        "read from a GGUF file",
        "size of that file is not recorded",
    ):
        assert text in render_card(made, "small")


def test_the_size_of_the_given_file_stands_beside_that_of_its_float_copy():
    made = report()
    made["result"]["memory"]["disk_bytes"] = 116_400_000
    source = {"name": "small.gguf", "bytes": 98_400_000, "license": "apache-2.0", "hub_id": "somebody/small"}
    card = render_card(made | {"sources": {"model": source, "data": []}}, "small")
    assert "| memory | files on disk, against the files given | 98.4 MB | 116.4 MB | 1.18x larger |" in card
    assert "116.4 MB on disk (base: 98.4 MB as given, " in card
    assert "files on disk, against the files given: 1.18x larger" in card.partition("## Limits")[2]
    source["bytes"] = made["base"]["memory"]["disk_bytes"]
    assert "against the files given" not in render_card(made | {"sources": {"model": source, "data": []}}, "small")
    found = ModelCard(card).data.to_dict()
    assert (found["license"], found["base_model"], found["base_model_relation"]) == (
        "apache-2.0", "somebody/small", "quantized",
    )  # fmt: skip


def test_a_name_that_the_hub_does_not_have_is_not_claimed():
    found = ModelCard(render_card(report(), "small")).data.to_dict()
    assert not {"base_model", "base_model_relation", "datasets", "license"} & set(found)
    assert found["model-index"][0]["results"][0]["dataset"]["name"].endswith("Python's standard library")
    data = [{"name": "me/texts", "hub_id": "me/texts"}]
    card = render_card(report() | {"sources": {"model": {}, "data": data}}, "small")
    assert ModelCard(card).data.datasets == ["me/texts"]
    assert "(https://huggingface.co/datasets/me/texts)" in card


def test_what_was_not_measured_is_said_and_nothing_is_claimed():
    made = report()
    for side in ("base", "result"):
        for name in ("inference", "training", "quality"):
            del made[side][name]
    card = render_card(made | {"ratios": ratios(made)}, "small")
    for group in ("inference speed", "training speed", "quality"):
        assert f"| {group} | not measured |" in card
    assert "quality was not measured" in card
    assert "model-index" not in card
    assert "faster" not in card
    made["result"]["quality"] = {"perplexity": 3.5}
    assert "held-out perplexity 3.50 (base: not measured)" in render_card(made, "small")


def test_folders_of_this_machine_are_not_shown():
    paths = {"model": "/home/somebody/base", "output": "/home/somebody/out"}
    data = {"data": {"source": "/home/somebody/letters.txt", "load": {}}}
    card = render_card(report(recipe=paths | data), "small")
    assert "/home/somebody" not in card
    assert "letters.txt" in card


def test_texts_of_models_cannot_break_out_of_their_block():
    card = render_card(report(), "small")
    body = card.partition("<summary>The same prompt")[2].partition("</details>\n\n")[0]
    assert body.count("````") == 4  # longer than the fence inside
    assert "| `lm_head` | float | tied \\| shared |" in card


def test_an_edit_of_any_character_is_noticed():
    card = render_card(report(), "small")
    assert is_untouched(card)
    body = card.rindex("<!--")
    for place in random.Random(0).sample(range(body), 20):
        assert not is_untouched(card[:place] + card[place + 1 :])
    assert not is_untouched(card + "more")
    assert not is_untouched("# small\n")


def test_a_card_that_was_edited_is_only_replaced_when_asked(folder):
    path = write_card(folder)
    assert write_card(folder) == path  # made again
    path.write_text(path.read_text() + "Mine.\n")
    with pytest.raises(SlimError, match="--overwrite"):
        write_card(folder)
    write_card(folder, overwrite=True)
    assert is_untouched(path.read_text())
    (folder / "report.json").unlink()
    with pytest.raises(SlimLoadError, match="hf-slim eval"):
        write_card(folder)


@pytest.mark.parametrize("form", ["slim", "standard"])
def test_the_snippets_of_a_card_load_the_model(form, tmp_path, monkeypatch):
    folder = save_model(tmp_path / "small", form)
    monkeypatch.chdir(tmp_path)
    names = {}
    (code,) = python_of(write_card(folder).read_text())
    exec(code, names)
    weights = convert(prepare(tiny.llama(), *CONFIGS[form]))
    assert torch.equal(tiny.logits(names["model"]), tiny.logits(weights))
    assert names["tokenizer"].decode([34]) == "A"
    assert ("import hf_slim" in code) == (form == "slim")


CONFIGS = {"slim": [QuantizationConfig("w8a8", embeddings="w8a8")], "standard": [PruningConfig(criterion="l2")]}


def test_a_classifier_is_loaded_as_one_and_without_a_tokenizer_there_is_no_line_for_it(tmp_path, monkeypatch):
    convert(prepare(tiny.bert(), QuantizationConfig("w8a16"))).save_pretrained(tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    card = render_card(report(saved=describe_saved(tmp_path / "small")), "small")
    for code in python_of(card):  # without hf_slim, and with it
        names = {}
        exec(code, names)
        assert type(names["model"]).__name__ == "BertForSequenceClassification"
        assert "AutoTokenizer" not in code
    assert ModelCard(card).data.pipeline_tag == "text-classification"


def test_every_technique_of_every_stage_is_told():
    stages = [
        {"student": {"keep": 0.5, "layers": None}, "quantization": None},
        {"pruning": {"target": {"macs": 0.6}, "criterion": "taylor"}, "quantization": None},
        {"pruning": None, "distillation": {"teacher": ["self", "big/one"], "alpha": 0.5, "alpha_end": 0.1}},
    ]
    card = render_card(report(recipe={"stages": stages, "vocabulary": {"round_to": 64}}), "small")
    done = card.partition("## What was done")[2].partition("\n## ")[0]
    assert "Stage 1: A smaller model was cut out of the base: keep 0.5." in done
    assert "Stage 2: Pruning to 60% of the multiply-adds, by taylor." in done
    assert "its own state before training and `big/one`" in done
    assert "weight 0.5 to 0.1" in done
    assert [line for line in done.splitlines() if "Quantization" in line] == [
        "- Stage 3: Quantization-aware training to w8a8; embeddings to w8a8."
    ]
    assert done.count("never uses") == 1  # before the first stage


@pytest.mark.parametrize("sparsity", [0.5, {"ffn": 0.5}, None])
def test_sparsity_in_every_form_is_a_share(sparsity):
    (step,) = steps_of({"pruning": {"sparsity": sparsity}})
    assert step.startswith("Pruning of 50% of the feed-forward neurons")


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_of_an_accuracy_ends_where_the_observed_share_is_just_possible(seed):
    number = random.Random(seed)
    share, count = number.uniform(0.01, 0.99), number.randrange(10, 3000)
    low, high = quality_interval({"quality": {"accuracy": share, "examples": count}})
    assert 0 <= low < share < high <= 1
    for end in (low, high):  # Wilson: 1.96 standard errors of the end's own distribution
        assert abs(share - end) == pytest.approx(1.96 * (end * (1 - end) / count) ** 0.5)
    made = report(seed)
    made["result"]["quality"] = {"accuracy": share, "examples": count}
    assert f"result {low:.2%} to {high:.2%}" in render_card(made, "small")
    assert quality_interval({}) is None
