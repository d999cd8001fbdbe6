"""`trainer.push_to_hub()` with hf_slim's callbacks, on a fake Hub."""

import json
import logging

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_slim import DistillationCallback, PruningCallback, QuantizationCallback
from hf_slim.hub.card import is_untouched
from hf_slim.hub.trainer import trainer_behind
from tests import tiny
from tests.documents import FENCE

CALLBACKS = {
    "pruning": lambda: [PruningCallback(tiny.PRUNING)],
    "quantization": lambda: [QuantizationCallback(tiny.QUANTIZATION)],
    "distillation": lambda: [DistillationCallback(tiny.DISTILLATION)],
    "all": lambda: [
        DistillationCallback(tiny.DISTILLATION), PruningCallback(tiny.PRUNING),
        QuantizationCallback(tiny.QUANTIZATION),
    ],
}  # fmt: skip


def trained(folder, callbacks, **changes):
    settings = {"max_steps": 2, "hub_model_id": "me/small", "eval_strategy": "steps", "eval_steps": 2}
    trainer = tiny.trainer(tiny.llama(), folder, callbacks, **(settings | changes))
    trainer.processing_class = tiny.tokenizer()
    trainer.train()
    return trainer


@pytest.mark.parametrize("which", list(CALLBACKS))
def test_the_card_and_the_report_are_ours(which, hub, tmp_path):
    trainer = trained(tmp_path / "run", CALLBACKS[which]())
    trainer.push_to_hub(license="mit", tags="mine")
    there = hub.files("me/small")
    assert {"model.safetensors", "config.json", "report.json", "README.md"} <= set(there)
    text = there["README.md"].decode()
    assert is_untouched(text)
    card = ModelCard(text)
    techniques = {"pruning", "quantization", "distillation"} if which == "all" else {which}
    assert {"hf_slim", "mine", *techniques} <= set(card.data.tags)
    assert card.data.license == "mit"  # what the user hands to push_to_hub is kept
    assert 'from_pretrained("me/small")' in text
    report = json.loads(there["report.json"])
    assert set(report["recipe"]) == {"model", "training", *techniques}
    loss = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert report["result"]["quality"] == {"loss": loss}
    for group in ("inference speed", "training speed"):
        assert f"| {group} | not measured |" in text


def test_sizes_before_and_after_are_those_of_the_models(hub, tmp_path):
    trainer = trained(tmp_path / "run", CALLBACKS["all"]())
    trainer.push_to_hub()
    report = json.loads(hub.files("me/small")["report.json"])
    plain = sum(parameter.numel() for parameter in tiny.llama().parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert report["base"]["compute"]["parameters"] == plain
    assert report["base"]["memory"]["ram_bytes"] >= 4 * plain
    assert report["result"]["compute"]["parameters"] < plain
    assert (
        report["result"]["compute"]["parameters"]
        == sum(
            module.in_features * module.out_features
            for name, module in loaded.named_modules()
            if name.endswith("_proj")
        )
        + 96 * 48
        + 7 * 48
    )  # embedding and norms
    names = [name for name in hub.files("me/small") if name.endswith((".safetensors", ".json", ".jinja", ".py"))]
    on_disk = sum(len(hub.files("me/small")[name]) for name in names if name != "report.json")
    assert report["result"]["memory"]["disk_bytes"] == on_disk


def test_the_callbacks_in_a_card_are_those_of_the_run(hub, tmp_path):
    trainer = trained(tmp_path / "run", CALLBACKS["all"]())
    trainer.push_to_hub()
    text = hub.files("me/small")["README.md"].decode()
    code = [code for language, code in FENCE.findall(text) if language == "python"][-1]
    names = {}
    exec(code, names)
    found = {type(callback).__name__: callback.config for callback in names["callbacks"]}
    given = {type(c).__name__: c.config for c in trainer.callback_handler.callbacks if type(c).__name__ in found}
    assert len(found) == 3
    assert found == given


def test_a_card_that_the_user_has_edited_survives_a_push_of_the_trainer(hub, tmp_path):
    trainer = trained(tmp_path / "run", CALLBACKS["pruning"]())
    trainer.push_to_hub()
    card = tmp_path / "run" / "README.md"
    edited = card.read_text().replace("## Limits", "## Limits\n\nDo not fly with it.")
    card.write_text(edited)
    trainer.push_to_hub()
    assert card.read_text() == edited
    assert hub.files("me/small")["README.md"].decode() == edited


def test_a_report_of_other_weights_is_replaced_and_a_measured_one_of_these_is_kept(hub, tmp_path):
    trainer = trained(tmp_path / "run", CALLBACKS["pruning"]())
    trainer.push_to_hub()
    file = tmp_path / "run" / "report.json"
    report = json.loads(file.read_text())
    speed = {"prefill_ms": {"median": 2.0, "low": 1.0, "high": 3.0}}
    for side in ("base", "result"):
        report[side]["inference"] = speed
    file.write_text(json.dumps(report))
    trainer.push_to_hub()
    assert json.loads(hub.files("me/small")["report.json"])["result"]["inference"] == speed
    report["saved"]["weights"] = {"model.safetensors": "of an earlier run"}
    file.write_text(json.dumps(report))
    trainer.push_to_hub()
    assert "inference" not in json.loads(hub.files("me/small")["report.json"])["result"]


def test_a_loss_of_an_earlier_step_is_not_that_of_the_result(hub, tmp_path):
    trainer = trained(tmp_path / "run", CALLBACKS["pruning"](), eval_strategy="no")
    trainer.state.log_history.append({"eval_loss": 0.1, "step": 1})
    trainer.push_to_hub()
    assert "quality" not in json.loads(hub.files("me/small")["report.json"])["result"]


def test_a_model_that_is_not_finished_keeps_the_card_of_the_trainer(hub, tmp_path, caplog):
    trainer = tiny.trainer(tiny.llama(), tmp_path / "run", CALLBACKS["quantization"](), hub_model_id="me/small")
    with caplog.at_level(logging.WARNING):
        trainer.push_to_hub()
    assert "saved no finished model" in caplog.text
    assert "Trainer" in hub.files("me/small")["README.md"].decode()
    assert "report.json" not in hub.files("me/small")


def test_a_model_that_pushes_itself_is_tagged(hub, tmp_path):
    trainer = trained(tmp_path / "run", CALLBACKS["all"]())
    trainer.model.push_to_hub("me/alone")
    tags = ModelCard(hub.files("me/alone")["README.md"].decode()).data.tags
    assert {"hf_slim", "pruning", "quantization"} <= set(tags)


def test_without_a_trainer_on_the_stack_none_is_found():
    assert trainer_behind(PruningCallback(tiny.PRUNING)) is None


def test_a_base_model_that_has_a_folder_is_named_with_its_size_and_licence(hub, tmp_path):
    base = tiny.save_base(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = tiny.trainer(model, tmp_path / "run", CALLBACKS["pruning"](), max_steps=2, hub_model_id="me/small")
    trainer.train()
    trainer.push_to_hub()
    text = hub.files("me/small")["README.md"].decode()
    assert ModelCard(text).data.license == "apache-2.0"
    given = sum(path.stat().st_size for path in base.iterdir() if path.name != "README.md")
    assert json.loads(hub.files("me/small")["report.json"])["sources"]["model"] == {
        "name": "base", "bytes": given, "license": "apache-2.0",
    }  # fmt: skip
    assert "base after pruning" in text
