"""`hf-slim make-student`: a teacher by name, and a folder that plain transformers loads."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_slim.cli.main import main
from tests import tiny
from tests.student.test_student import assert_same, layer_weights


@pytest.fixture
def base(tmp_path):
    return tiny.save_base(tmp_path / "base")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"a small cabin, number {number}, by the sea" * 3 for number in range(900)))
    return path


def test_the_command_saves_an_ordinary_checkpoint_with_the_tokenizer(base, tmp_path, capsys):
    output = tmp_path / "out" / "student"
    arguments = ["make-student", str(base), "--layers", "0,2", "--output", str(output)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "Kept layers of model.layers: 0, 2" in out
    assert "parameters (M)" in out
    model, old = (AutoModelForCausalLM.from_pretrained(folder) for folder in (output, base))
    assert_same(layer_weights(model, "model.layers", 1), layer_weights(old, "model.layers", 2))
    assert AutoTokenizer.from_pretrained(output).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert [path.name for path in output.parent.iterdir()] == ["student"]


def test_the_command_takes_data(base, text, tmp_path):
    output = tmp_path / "student"
    arguments = ["--keep", "0.67", "--choose", "importance", "--ffn", "32", "--data", str(text), "--dtype", "bfloat16"]
    assert main(["make-student", str(base), *arguments, "--output", str(output)]) == 0
    config = AutoModelForCausalLM.from_pretrained(output).config
    assert [config.num_hidden_layers, config.intermediate_size, config.dtype] == [2, 32, torch.bfloat16]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--keep", "1.0"], "this shape is the teacher's"),
        (["--layers", "0;2"], "Write --layers 0,3,6"),
        (["--layers", "0,2", "--data", "stdlib"], "nothing is chosen by it"),
        (["--layers", "7"], "0 to 2"),
    ],
)
def test_the_command_refuses_before_it_reads_weights(base, tmp_path, arguments, says, capsys, monkeypatch):
    monkeypatch.setattr("hf_slim.workflows.make_student.load_model", None)
    assert main(["make-student", str(base), *arguments, "--output", str(tmp_path / "student")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


def test_a_stack_of_its_own_and_fresh_weights_on_the_command_line(tmp_path):
    tiny.t5().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    arguments = ["--layers", "decoder=0", "--fresh", "--output", str(tmp_path / "student")]
    assert main(["make-student", str(tmp_path / "base"), *arguments]) == 0
    config = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student").config
    assert [config.num_layers, config.num_decoder_layers] == [2, 1]
