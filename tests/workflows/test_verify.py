"""hf-slim verify: models and stored teachers against what was recorded, and stages before they are resumed."""

import json

import pytest
from safetensors.torch import load_file, save_file

from hf_slim import SlimLoadError, verify
from hf_slim.cli.main import main
from hf_slim.integration.saving import publish
from hf_slim.recipe import load_recipe
from hf_slim.version import __version__
from hf_slim.workflows.stages import RunFolders
from tests import tiny
from tests.distillation.store.test_reader import folder as store  # noqa: F401  a fixture
from tests.workflows.test_stages import recipe_file  # noqa: F401  a fixture


@pytest.fixture
def made(tmp_path):
    publish(tiny.llama(), tiny.tokenizer(), tmp_path / "made")
    return tmp_path / "made"


def test_a_folder_is_what_was_recorded(made, capsys):
    found = verify(made)
    paths = [path for path in made.iterdir() if path.name != "hf_slim.json"]
    assert (found.files, found.size_bytes) == (len(paths), sum(path.stat().st_size for path in paths))
    assert found.version == __version__
    assert main(["verify", str(made)]) == 0
    assert f"{len(paths)} files" in capsys.readouterr().out


def test_a_changed_folder_is_refused_until_the_change_is_recorded(made, capsys):
    config = json.loads((made / "config.json").read_text()) | {"rms_norm_eps": 0.1}
    (made / "config.json").write_text(json.dumps(config))
    assert main(["verify", str(made)]) == 2
    assert "'config.json'" in capsys.readouterr().err
    assert verify(made, record=True).files == verify(made).files


def test_what_is_damaged_is_not_recorded(made):
    weights = (made / "model.safetensors").read_bytes()
    (made / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(SlimLoadError, match="is no complete safetensors file"):
        verify(made, record=True)
    with pytest.raises(SlimLoadError, match=r"'model\.safetensors' has .* bytes and had"):
        verify(made)


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(SlimLoadError, match="is no folder"):
        verify(tmp_path / "nothing")


def test_a_stored_teacher_is_compared_with_its_checksums(store):  # noqa: F811
    found = verify(store)
    assert found.files == len(list(store.glob("*.safetensors")))
    shard = next(store.glob("*.safetensors"))
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(SlimLoadError, match=rf"{shard.name} has other content"):
        verify(store)


def test_a_stage_is_verified_before_a_run_goes_on_with_it(recipe_file, tmp_path):  # noqa: F811
    folders = RunFolders(load_recipe(recipe_file), tmp_path)
    folders.keep(1, tiny.llama(), tiny.tokenizer(), [{"loss": 1.0}])
    assert folders.finished() == 1
    folders.load(1, type(tiny.llama()))
    assert folders.log(1) == [{"loss": 1.0}]
    file = folders.model(1) / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] += 1
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(SlimLoadError, match=r"'model\.safetensors' has other content"):
        folders.load(1, type(tiny.llama()))
    (folders.model(1).parent / "log.json").write_text("[")
    with pytest.raises(SlimLoadError, match="the log of a finished stage"):
        folders.log(1)
