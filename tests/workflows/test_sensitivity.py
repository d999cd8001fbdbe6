"""The command `hf-slim sensitivity` from model to recipe section."""

import json

import pytest
import yaml

from hf_slim import QuantizationConfig, prepare
from hf_slim.cli.main import main
from hf_slim.core.errors import SlimError
from hf_slim.quantization.transform import quantized_layers
from hf_slim.workflows.sensitivity import parse_budget
from tests import tiny


def test_the_command_writes_a_section_that_meets_the_budget(tmp_path, capsys):
    base = tiny.save_base(tmp_path / "base")
    output = tmp_path / "out" / "mix"
    schemes = ["--schemes", "w2a16-g16", "w4a16-g16", "w8a16"]
    data = ["--data", "stdlib", "--block-size", "32"]
    assert main(["sensitivity", str(base), "--budget", "4.5bits", "--output", str(output), *schemes, *data]) == 0
    section = yaml.safe_load(output.with_suffix(".yaml").read_text())["quantization"]
    schemes = quantized_layers(prepare(tiny.llama(), QuantizationConfig.from_dict(section)))
    report = json.loads(output.with_suffix(".json").read_text())
    assert {name: str(scheme) for name, scheme in schemes.items()} == report["schemes"]
    assert report["chosen"]["bits_per_weight"] <= 4.5
    assert report["uniform"]["w2a16-g16"]["divergence"] > report["chosen"]["divergence"]
    assert output.with_suffix(".png").stat().st_size > 5000
    assert "bits per weight" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "many", "0", "99bits"])
def test_a_budget_that_means_nothing_is_refused(text):
    with pytest.raises(SlimError, match="bits per weight between 1 and 16"):
        parse_budget(text)
