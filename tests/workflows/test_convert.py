"""Packed folders in other formats, and back."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_slim import PruningConfig, QuantizationConfig, SlimConfigError, SlimError, convert, convert_folder, prepare
from hf_slim.cli.main import main
from tests import tiny
from tests.integration.formats.cells import plain_model, written


@pytest.fixture
def small(tmp_path):
    model = convert(prepare(plain_model("llama", dtype=torch.bfloat16), QuantizationConfig("w8a16")))
    model.save_pretrained(tmp_path / "small")
    tiny.tokenizer().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def logits_of(folder) -> torch.Tensor:
    return tiny.logits(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("name", ["gemma", "slim", "auto"])
def test_values_stay_and_the_way_back_gives_the_same_files(name, small, tmp_path):
    report = convert_folder(small, name, tmp_path / "other")
    saved = json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"]
    assert report["format"] == ("compressed-tensors" if name == "auto" else name)
    assert saved["quant_method"] == {"gemma": "gemma", "slim": "hf_slim", "auto": "compressed-tensors"}[name]
    assert torch.equal(logits_of(tmp_path / "other"), logits_of(small))
    convert_folder(tmp_path / "other", "compressed-tensors", tmp_path / "back")
    back = written(tmp_path / "back")
    back.pop("hf_slim.json")  # a published folder records its checksums, a saved one does not
    assert back == written(small)


def test_other_files_come_along_but_not_what_speaks_of_the_old_ones(small):
    (small / "report.json").write_text("{}")
    (small / "README.md").write_text("a card")
    convert_folder(small, "slim")
    output = small.with_name("small-slim")
    assert not {"report.json", "README.md"} & {path.name for path in output.iterdir()}
    assert AutoTokenizer.from_pretrained(output)("abc")["input_ids"] == tiny.tokenizer()("abc")["input_ids"]


def test_a_finished_model_is_replaced_only_if_asked(small, tmp_path):
    convert_folder(small, "slim", tmp_path / "other")
    before = written(tmp_path / "other")
    with pytest.raises(SlimError, match="--overwrite"):
        convert_folder(small, "gemma", tmp_path / "other")
    assert written(tmp_path / "other") == before
    assert convert_folder(small, "gemma", tmp_path / "other", overwrite=True)["format"] == "gemma"
    with pytest.raises(SlimError, match="the folder itself"):
        convert_folder(small, "gemma", small)


def test_a_format_that_does_not_hold_the_values_is_refused(small, tmp_path):
    with pytest.raises(
        SlimConfigError, match=r"nf4 or fp4.*Formats that hold this model: compressed-tensors, gemma, slim"
    ):
        convert_folder(small, "bitsandbytes", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("configs", "says"),
    [
        ([QuantizationConfig("w8a8")], "training checkpoint"),
        ([PruningConfig({"ffn": 0.4}, uniform=False, criterion="l2")], "pruned and not quantized"),
        ([], "not packed by hf_slim"),
    ],
)
def test_folders_that_are_not_packed_say_what_they_are(configs, says, tmp_path):
    model = prepare(plain_model("llama"), *configs) if configs else plain_model("llama")
    if "pruned" in says:
        convert(model)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SlimError, match=says):
        convert_folder(tmp_path / "model", "slim", tmp_path / "other")


def test_the_command_says_what_loads_the_result(small, tmp_path, capsys):
    assert main(["convert", str(small), "--to", "gemma", "--output", str(tmp_path / "other")]) == 0
    assert "without another package" in capsys.readouterr().out
    assert main(["convert", str(small), "--to", "gema", "--output", str(tmp_path / "x")]) == 2
    assert "Did you mean 'gemma'" in capsys.readouterr().err
