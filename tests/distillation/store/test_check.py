"""Stored teachers from strangers: damaged ones are refused before anything is allocated for them."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_slim import SlimDataError, SlimLoadError
from hf_slim.distillation.store.format import MANIFEST
from hf_slim.distillation.store.reader import StoredTeacher
from hf_slim.distillation.store.writer import StoredTeacherWriter, shards_in
from tests.damage import damage, files_opened, fuzzing, memory_used
from tests.distillation.store.test_reader import INFO, examples, folder, padded, write  # noqa: F401

SHARD = "shard-0-0.safetensors"


def edit(folder, change):  # noqa: F811
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edit_shard(folder, change):  # noqa: F811
    """Other tensors or metadata in the shard, and a manifest that knows its size."""
    with safe_open(folder / SHARD, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / SHARD)
    change(tensors, metadata)
    save_file(tensors, folder / SHARD, metadata)
    edit(folder, lambda manifest: manifest["shards"][0].update(size_bytes=(folder / SHARD).stat().st_size))


@pytest.mark.parametrize("name", ["../store/shard-0-0.safetensors", "/etc/hostname", "a/b", 3, None, [SHARD]])
def test_a_manifest_may_not_lead_outside(folder, name):  # noqa: F811
    edit(folder, lambda manifest: manifest["shards"][0].update(file=name))
    with pytest.raises(SlimLoadError, match="a file inside this folder, without a path"):
        StoredTeacher.open(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(k="8"), "`k` must be a whole number"),
        (lambda m: m.update(n_classes=10**12), "`n_classes` must be a whole number"),
        (lambda m: m.update(n_classes=None), "`n_classes` must be a whole number"),
        (lambda m: m.update(temperature="2"), "`temperature` must be a positive number"),
        (lambda m: m.update(tokenizer_hash=3), "`tokenizer_hash` must be a text"),
        (lambda m: m.update(per=["token"]), "`per` must be"),
        (lambda m: m.update(n_examples=-1), "`n_examples` must be a whole number from 0"),
        (lambda m: m.update(shards={}), "`shards` must be a list"),
        (lambda m: m.update(shards=[SHARD]), "`shards` must be a list"),
        (lambda m: m.update(shards=[]), "no shards are listed"),
        (lambda m: m.update(shards=m["shards"] * 2), "it names a shard twice"),
        (lambda m: m["shards"][0].pop("size_bytes"), "`size_bytes` must be a whole number"),
        (lambda m: m["shards"][0].update(n_answers=1), "of another stored teacher"),
        (lambda m: m.update(temperature=3.0), "of another stored teacher"),
        (lambda m: m.update(version=2), "is of version 2"),
        (lambda m: m.pop("per"), r"lacks \['per'\]"),
    ],
)
def test_a_damaged_manifest_is_refused(folder, change, says):  # noqa: F811
    edit(folder, change)
    with pytest.raises(SlimLoadError, match=says):
        StoredTeacher.open(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, m: t.update(keys=t["keys"].int()), "its settings need"),
        (lambda t, m: t.update(keys=t["keys"][0].clone()), "its settings need"),
        (lambda t, m: t.update(offsets=t["offsets"][1:].clone()), "its settings need"),
        (lambda t, m: t.update(ids=t["ids"][:, 1:].clone()), "its settings need"),
        (lambda t, m: t.update(log_probabilities=t["log_probabilities"].float()), "its settings need"),
        (lambda t, m: t.pop("log_probabilities"), "its settings need"),
        (lambda t, m: t.update(offsets=t["offsets"] + 1), "must rise from 0 to"),
        (lambda t, m: t.update(offsets=t["offsets"].flip(0).contiguous()), "must rise from 0 to"),
        (lambda t, m: t["offsets"].__setitem__(1, -5), "must rise from 0 to"),
        (lambda t, m: m.update(mass_held="much"), "could not convert"),
        (lambda t, m: m.update(mass_held="nan"), "`mass_held` is nan"),
        (lambda t, m: m.pop("mass_held"), "is damaged"),
        (lambda t, m: m.pop("info"), "is not readable"),
        (lambda t, m: m.update(info="{}"), "it lacks dtype, k, n_classes"),
        (lambda t, m: m.update(info="[1]"), "must hold a JSON object"),
    ],
)
def test_a_damaged_shard_is_refused(folder, change, says):  # noqa: F811
    edit_shard(folder, change)
    with pytest.raises(SlimLoadError, match=says):
        StoredTeacher.open(folder)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ids", INFO.n_classes, rf"names the class {INFO.n_classes}, and the teacher has {INFO.n_classes}"),
        ("log_probabilities", 0.5, "log-probabilities outside"),
        ("log_probabilities", float("nan"), "log-probabilities outside"),
        ("log_probabilities", float("-inf"), "log-probabilities outside"),
    ],
)
def test_predictions_that_no_teacher_makes_are_refused_when_they_are_read(folder, name, value, says):  # noqa: F811
    edit_shard(folder, lambda tensors, metadata: tensors[name].__setitem__((0, 0), value))
    store = StoredTeacher.open(folder)
    with pytest.raises(SlimLoadError, match=says):
        store.top_k(padded(examples()[:4]))


def test_a_shard_that_is_a_device_or_a_pipe_is_not_opened(folder):  # noqa: F811
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    with pytest.raises(SlimLoadError, match="is no regular file"):
        StoredTeacher.open(folder)


def test_names_that_are_no_shards_do_not_disturb_a_writer(folder, tmp_path):  # noqa: F811
    (folder / "shard-a-b.safetensors").write_text("")
    (folder / f"shard-0-{10**12}.safetensors").write_text("")
    assert [path.name for path in shards_in(folder)] == [SHARD]
    assert shards_in(folder, rank=1) == []
    write(StoredTeacherWriter(tmp_path / "new", INFO), examples())
    assert len(shards_in(tmp_path / "new", rank=0)) == 1


@fuzzing(120, share=0.1)
@given(data=st.data())
def test_a_damaged_store_is_refused_or_says_the_same(folder, data):  # noqa: F811
    inputs = padded(examples()[:3])
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    expected = StoredTeacher.open(folder).top_k(inputs)
    name = data.draw(st.sampled_from([MANIFEST, SHARD]))
    try:
        damage(data.draw, folder, name)
        size = sum(path.stat().st_size for path in folder.iterdir())
        with files_opened() as opened, memory_used() as memory:
            try:
                found = StoredTeacher.open(folder).top_k(inputs)
            except (SlimLoadError, SlimDataError):  # of other keys, an example is none that is stored
                found = None
        assert memory.peak < 2 * size + 2**20
        assert all(os.path.dirname(path) in (str(folder), "") for path in opened)
        if found is not None and name == MANIFEST:
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    finally:
        for path, raw in whole.items():
            path.write_bytes(raw)
