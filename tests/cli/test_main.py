import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import hf_slim
from hf_slim import SlimLoadError, load_recipe
from hf_slim.cli.main import VERBS, main
from hf_slim.progress import progress_is_shown
from hf_slim.workflows.evaluate import in_fresh_process
from hf_slim.workflows.stages import RunFolders
from hf_slim.workflows.train import train_stages
from hf_slim.workflows.verbosity import set_verbosity
from tests import tiny
from tests.workflows.test_train import recipe_file  # noqa: F401  a fixture


@pytest.fixture(autouse=True)
def _normal_verbosity():
    yield
    set_verbosity()


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_help_teaches_every_command(capsys):
    verbs = (
        "train",
        "inspect",
        "eval",
        "sensitivity",
        "shrink-vocabulary",
        "make-student",
        "cache-teacher",
        "convert",
        "export",
        "card",
        "push",
        "verify",
        "settings",
    )
    assert len(verbs) == len(VERBS)
    for command in verbs:
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
    assert "is no complete safetensors file" in err
    assert not (tmp_path / "out").exists()


def test_a_finished_model_is_refused_before_anything_is_loaded(recipe_file, tmp_path, capsys):  # noqa: F811
    (tmp_path / "out" / "small").mkdir(parents=True)
    (tmp_path / "out" / "small" / "config.json").write_text(json.dumps({}))
    for extra in ((), ("--dry-run",)):
        code, _, err = run(capsys, "train", recipe_file, *extra)
        assert code == 2
        assert "--overwrite" in err


def broken(monkeypatch, error):
    """`hf-slim inspect` fails with this error."""

    def fail(*arguments):
        raise error

    monkeypatch.setattr("hf_slim.workflows.inspect.load_model", fail)
    monkeypatch.setattr("hf_slim.workflows.inspect.class_of", lambda spec: None)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (SlimLoadError("It is damaged. Fetch it again."), 2, "hf-slim: It is damaged. Fetch it again."),
        (PermissionError(13, "Permission denied", "x"), 2, "Check the path, its permissions and the free space."),
        (KeyboardInterrupt(), 130, "hf-slim: interrupted."),
        (TypeError("no such argument"), 1, "unexpected TypeError: no such argument. Please report it"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_an_exit_code_and_one_paragraph(error, code, says, capsys, monkeypatch):
    broken(monkeypatch, error)
    found, out, err = run(capsys, "inspect", "model")
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert says in err


@pytest.mark.parametrize("error", [SlimLoadError("It is damaged."), OSError("disk"), TypeError("no such argument")])
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_traceback_is_shown_where_one_is_asked_for(error, place, capsys, monkeypatch):
    broken(monkeypatch, error)
    arguments = ["--traceback", "inspect", "model"] if place == "before" else ["inspect", "model", "--traceback"]
    _, _, err = run(capsys, *arguments)
    assert "Traceback (most recent call last)" in err
    assert ", in fail" in err
    assert err.strip().splitlines()[-1].startswith("hf-slim: ")


def test_the_traceback_of_an_unforeseen_error_is_kept(capsys, monkeypatch):
    broken(monkeypatch, ZeroDivisionError("by zero"))
    file = Path(re.search(r"traceback in (\S+)\.\n", run(capsys, "inspect", "model")[2])[1])
    assert ", in fail" in file.read_text()
    file.unlink()


@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_shows_the_result_and_no_bars(place, tmp_path, capsys):
    base = tiny.save_base(tmp_path / "base")
    arguments = ["shrink-vocabulary", base, "--output", tmp_path / "small", "--overwrite", "--data", data_in(tmp_path)]
    code, out, err = run(capsys, *arguments)
    assert code == 0
    assert "tokenizing" in err  # the bars are on stderr
    quiet = ["--quiet", *arguments] if place == "before" else [*arguments, "--quiet"]
    code, short, err = run(capsys, *quiet)
    assert (code, short) == (0, out)
    assert "tokenizing" not in err
    assert "it/s" not in err


def data_in(folder):
    file = folder / "data.txt"
    file.write_text("\n".join(f"line {number}" for number in range(100)))
    return file


def test_a_quiet_run_trains_without_bars_and_without_a_printed_log(recipe_file, tmp_path, capsys):  # noqa: F811
    set_verbosity("quiet")
    (tmp_path / "scratch").mkdir()
    recipe = load_recipe(recipe_file, ["training.disable_tqdm=false"])
    made = train_stages(recipe, RunFolders(recipe, tmp_path / "scratch"))
    assert any("loss" in entry for entry in made.log)
    out, err = capsys.readouterr()
    assert not out
    assert "loss" not in err
    assert "it/s" not in err


def test_verbose_says_where_a_long_step_starts(tmp_path, capsys):
    base = tiny.save_base(tmp_path / "base")
    arguments = ["shrink-vocabulary", base, "--output", tmp_path / "small", "--overwrite", "--data", data_in(tmp_path)]
    assert "Reading the data" not in run(capsys, *arguments)[2]
    assert f"INFO: Reading the data '{tmp_path / 'data.txt'}'" in run(capsys, *arguments, "--verbose")[2]


def test_quiet_and_verbose_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--quiet", "inspect", "model", "--verbose"])
    assert stop.value.code == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--version"], ["train", "--version"]])
def test_the_version_is_told(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"hf-slim {hf_slim.__version__}\n"


@pytest.mark.parametrize(("arguments", "section"), [([], None), (["pruning"], "pruning")])
def test_settings_are_described(arguments, section, capsys, monkeypatch):
    asked = []
    described = SimpleNamespace(describe_settings=lambda section: asked.append(section) or "as described")
    monkeypatch.setitem(sys.modules, "hf_slim.workflows.settings", described)
    assert run(capsys, "settings", *arguments) == (0, "as described\n", "")
    assert asked == [section]


def test_a_fresh_process_shows_what_this_one_does(tmp_path):
    for level in ("quiet", "normal"):
        set_verbosity(level)
        assert in_fresh_process(progress_is_shown) == (level == "normal")
