import json

import pytest

from hf_slim.cli.main import main
from tests import tiny
from tests.workflows.test_train import recipe_file  # noqa: F401  a fixture


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_help_teaches_every_command(capsys):
    for command in ("train", "inspect", "eval", "sensitivity", "shrink-vocabulary", "make-student", "cache-teacher"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"hf-slim {command} " in capsys.readouterr().out
    assert main([]) == 2


def test_a_dry_run_plans_and_touches_nothing(recipe_file, tmp_path, capsys):  # noqa: F811
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run(capsys, "train", recipe_file, "--dry-run")
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert "4 steps of 2 x 16 tokens" in out
    total = sum(parameter.numel() for parameter in tiny.llama().parameters())
    assert f"{total / 1e6:.1f} M" in out
    assert "loses 16 groups, w8a8" in out


def test_a_dry_run_says_what_a_target_in_time_goes_by(recipe_file, capsys, monkeypatch):  # noqa: F811
    def weights(jobs, given):
        return {name: float(sum(p.numel() for p in block.parameters())) for name, (_, block) in jobs.items()}

    monkeypatch.setattr("hf_slim.pruning.budget.latency._times", weights)
    code, out, _ = run(capsys, "train", recipe_file, "--dry-run", "--set", "pruning={target: {latency: 0.7}}")
    assert code == 0
    assert "measured    on cpu in float32, input_ids 1 x 62: layers" in out
    assert "model.layers.0.mlp/ffn (and 2 like it), ms by what is kept: 64: 9216.00" in out


def test_inspect_shows_layers_and_groups(tmp_path, capsys):
    code, out, _ = run(capsys, "inspect", tiny.save_base(tmp_path / "base"))
    assert code == 0
    assert "model.layers.2.mlp/ffn" in out
    assert "float32" in out


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("pruning.sparsity.ffn=50", "share, not a percentage"),
        ("quantization.scheme=w9a9", "Unknown quantization scheme"),
        ("quantization.ignore=['*']", "Nothing to quantize"),
        ("data.text_column=body", "no column 'body'"),
        ("data.source=missing.jsonl", "does not exist"),
        ("data.block_size=100000", "fewer than"),
        ("model=no/such/model", "could not be loaded"),
        ("model=package:nothing_here/model", "was not found"),
        ("training.max_stepz=1", "'max_steps'"),
        ("pruning.sparsity.kv_heads=0.1", "removes nothing"),
    ],
)
def test_bad_input_is_one_paragraph_and_code_2_and_leaves_the_disk(recipe_file, override, says, tmp_path, capsys):  # noqa: F811
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, "train", recipe_file, "--set", override)
    assert code == 2
    assert says in err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("hf-slim: ")
    assert not out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_refused(recipe_file, tmp_path, capsys):  # noqa: F811
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    code, _, err = run(capsys, "train", recipe_file)
    assert code == 2
    assert "could not be loaded" in err
    assert not (tmp_path / "out").exists()


def test_a_finished_model_is_refused_before_anything_is_loaded(recipe_file, tmp_path, capsys):  # noqa: F811
    (tmp_path / "out" / "small").mkdir(parents=True)
    (tmp_path / "out" / "small" / "config.json").write_text(json.dumps({}))
    for extra in ((), ("--dry-run",)):
        code, _, err = run(capsys, "train", recipe_file, *extra)
        assert code == 2
        assert "--overwrite" in err
