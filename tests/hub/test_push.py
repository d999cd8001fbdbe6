"""Pushing to a fake Hub: what arrives, what stays away, and what is left after a failure."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_slim import PruningCallback, SlimConfigError, SlimHubError, push, write_card
from hf_slim.cli.main import main
from tests import tiny
from tests.documents import FENCE, snippets
from tests.hub.conftest import digests, save_model, shard_
from tests.hub.fake_hub import TOKEN

ROOT = Path(__file__).parents[2]
REPO = "me/small"


@pytest.mark.parametrize("uses_lfs", [True, False])
def test_every_file_of_the_model_arrives_and_the_folder_stays_as_it_was(uses_lfs, hub, folder):
    hub.uses_lfs = uses_lfs
    before = digests(folder)
    pushed = push(folder, REPO)
    assert digests(folder) == before
    there = hub.files(REPO)
    assert set(there) == {*(path.name for path in folder.iterdir()), "README.md"} == set(pushed.files)
    assert all(there[path.name] == path.read_bytes() for path in folder.iterdir())
    assert pushed.url == f"{hub.url}/{REPO}"
    assert len(hub.repos[REPO]["commits"]) == 1
    assert bool(hub.blobs) == uses_lfs


def test_the_card_names_the_repository_and_says_what_the_hub_reads(hub, folder):
    write_card(folder)
    assert 'from_pretrained("small")' in (folder / "README.md").read_text()
    push(folder, REPO)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert f'from_pretrained("{REPO}")' in card.text
    assert f"hf download {REPO} report.json" in card.text
    found = card.data.to_dict()
    assert {"hf_slim", "quantization", "pruning", "distillation", "w8a8"} <= set(found["tags"])
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "text-generation")
    measured = json.loads((folder / "report.json").read_text())["result"]["quality"]["perplexity"]
    assert card.data.eval_results[0].metric_value == pytest.approx(measured, abs=1e-4)


def test_what_belongs_to_training_stays_here(hub, folder):
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.safetensors").write_bytes(b"moments")
    others = (
        "training_args.bin",
        "scheduler.pt",
        "trainer_state.json",
        ".env",
        "_scratch.json",
        "notes.txt",
        "model.partial-1",
    )
    for name in others:
        (folder / name).write_bytes(b"mine")
    pushed = push(folder, REPO)
    assert set(pushed.left_out) == {*others, "checkpoint-3"}
    assert not set(hub.files(REPO)) & {*others, "checkpoint-3/optimizer.safetensors"}


def test_code_goes_along_where_the_config_refers_to_it(hub, folder):
    (folder / "modeling.py").write_text("import hf_slim\n")
    assert push(folder, REPO).left_out == ("modeling.py",)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.AutoModelForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    assert not push(folder, REPO).left_out
    assert hub.files(REPO)["modeling.py"] == b"import hf_slim\n"


def test_a_private_repository_is_private_and_a_public_one_is_not_taken_for_one(hub, folder):
    push(folder, REPO, private=True)
    assert hub.repos[REPO]["private"]
    hub.add("me/open")
    with pytest.raises(SlimHubError, match="is public"):
        push(folder, "me/open", private=True)
    assert not hub.files("me/open")
    push(folder, "me/shown")
    assert not hub.repos["me/shown"]["private"]


def test_a_revision_is_a_branch_that_leaves_main_alone(hub, folder):
    pushed = push(folder, REPO, revision="int8")
    assert not hub.files(REPO)
    assert "model.safetensors" in hub.files(REPO, "int8")
    assert f'from_pretrained("{REPO}", revision="int8")' in hub.files(REPO, "int8")["README.md"].decode()
    assert pushed.url.endswith("/tree/int8")
    push(folder, REPO, revision="int8")  # the branch is there by now


@pytest.mark.parametrize("where", ["repos/create", "validate-yaml", "preupload", "batch", "PUT /lfs", "/commit/"])
def test_a_push_goes_on_after_a_failure_in_the_middle(where, hub, folder):
    hub.fails = {where: 1}
    push(folder, REPO)
    assert hub.fails == {where: 0}
    assert hub.files(REPO)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert len(hub.repos[REPO]["commits"]) == 1


def test_a_push_that_failed_leaves_both_sides_and_can_be_repeated(hub, folder):
    hub.fails = {"/commit/": 10**6}
    before = digests(folder)
    with pytest.raises(SlimHubError, match=r"500.*Run the same command again"):
        push(folder, REPO)
    assert digests(folder) == before
    assert not hub.files(REPO)
    sent = [line for line in hub.requests if line.startswith("PUT /lfs")]
    hub.fails = {}
    push(folder, REPO)
    assert [line for line in hub.requests if line.startswith("PUT /lfs")] == sent  # the weights had arrived
    assert set(hub.files(REPO)) > {"model.safetensors", "README.md"}


def test_a_second_push_of_the_same_model_changes_nothing(hub, folder):
    push(folder, REPO)
    push(folder, REPO)
    assert len(hub.repos[REPO]["commits"]) == 1


def test_weights_of_an_earlier_model_do_not_stay_beside_new_ones(hub, folder, tmp_path):
    shard_(folder)
    (folder / "report.json").unlink()  # it is about the one file
    push(folder, REPO)
    assert "model.safetensors.index.json" in hub.files(REPO)
    whole = save_model(tmp_path / "whole", seed=1)
    push(whole, REPO)
    assert [name for name in hub.files(REPO) if "safetensors" in name] == ["model.safetensors"]
    assert len(hub.repos[REPO]["commits"]) == 2


def test_without_a_token_nothing_is_asked(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(SlimHubError, match="hf auth login"):
        push(folder, REPO)
    assert not hub.requests


def test_a_token_that_the_hub_refuses_is_named_as_the_cause(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with pytest.raises(SlimHubError, match="token was not accepted"):
        push(folder, REPO)
    assert len([line for line in hub.requests if "create" in line]) == 1  # it is not tried again
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SlimHubError, match="may not write there"):
        push(folder, "somebody/small")


@pytest.mark.parametrize("name", ["small", "me/my model", "me/small/v2", "me/--small", "", "me/", "/small"])
def test_a_wrong_name_is_refused_before_anything_is_asked(name, hub, folder):
    with pytest.raises(SlimConfigError, match="user/"):
        push(folder, name)
    assert not hub.requests


def test_offline_says_which_setting_to_change(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SlimHubError, match="HF_HUB_OFFLINE"):
        push(folder, REPO)


def test_a_card_that_was_edited_is_sent_as_it_is(hub, folder):
    card = write_card(folder)
    edited = card.read_text().replace("## Limits", "## Limits\n\nDo not fly with it.")
    card.write_text(edited)
    push(folder, REPO)
    assert hub.files(REPO)["README.md"].decode() == edited


def test_a_model_without_a_report_gets_a_card_without_numbers(hub, folder, caplog):
    (folder / "report.json").unlink()
    with caplog.at_level(logging.WARNING):
        push(folder, REPO)
    assert "has no report.json" in caplog.text
    text = hub.files(REPO)["README.md"].decode()
    assert "| quality | not measured |" in text
    assert "quantization" in ModelCard(text).data.tags
    assert not re.search(r"\d+\.\d+x", text)


def test_paths_of_this_machine_are_warned_of(hub, folder, caplog):
    made = json.loads((folder / "report.json").read_text())
    made["recipe"]["data"]["source"] = "/home/somebody/letters.txt"
    (folder / "report.json").write_text(json.dumps(made))
    with caplog.at_level(logging.WARNING):
        push(folder, REPO)
    assert "everybody can read then: /home/somebody/letters.txt" in caplog.text
    assert "/home/somebody" not in hub.files(REPO)["README.md"].decode()


def test_the_command_prints_what_was_sent_and_explains_what_failed(hub, folder, capsys):
    (folder / "optimizer.log").write_text("")
    assert main(["push", str(folder), REPO, "--revision", "v2"]) == 0
    out = capsys.readouterr().out
    assert "model.safetensors" in out
    assert "Left out: optimizer.log" in out
    assert out.endswith(f"{hub.url}/{REPO}/tree/v2\n")
    assert main(["push", str(folder), "somebody/small"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_snippets_of_the_guide_do_what_they_say(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(Path("small"))
    settings = {"max_steps": 2, "hub_model_id": "me/trained"}
    trainer = tiny.trainer(tiny.llama(), Path("run"), [PruningCallback(tiny.PRUNING)], **settings)
    trains, pushes = snippets(ROOT / "docs/guides/sharing.md", "python")
    exec(trains, {"trainer": trainer})
    assert ModelCard(hub.files("me/trained")["README.md"].decode()).data.license == "apache-2.0"
    exec(pushes, {})
    assert f"\n{hub.url}/me/small (" in capsys.readouterr().out
    assert hub.repos[REPO]["private"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["slim", "standard"])
def test_a_fresh_process_loads_what_was_pushed_as_the_card_says(form, hub, tmp_path):
    folder = save_model(tmp_path / "small", form)
    push(folder, REPO, private=True)
    card = hub.files(REPO)["README.md"].decode()
    snippet = next(code for language, code in FENCE.findall(card) if language == "python")
    assert ("import hf_slim" in snippet) == (form == "slim")
    code = f"{snippet}\nimport torch\nfrom safetensors.torch import save_file\n"
    code += "with torch.no_grad(): logits = model(input_ids=torch.arange(12)[None]).logits\n"
    code += f"save_file({{'logits': logits}}, {str(tmp_path / 'logits')!r})\nprint(tokenizer.decode([34]))"
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "A\n"
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = tiny.logits(model, torch.arange(12)[None])
    assert torch.equal(load_file(tmp_path / "logits")["logits"], expected)
