"""Writing a stored teacher: in one go, in parts, by several ranks."""

import pytest
import torch

from hf_slim import SlimError
from hf_slim.distillation.store import writer as storing
from hf_slim.distillation.store.format import data_fingerprint, model_hash, row_key, tokenizer_hash
from hf_slim.distillation.store.reader import StoredTeacher
from hf_slim.distillation.store.writer import StoredTeacherWriter, finish_store
from tests import tiny
from tests.distillation.store.test_reader import BATCH, INFO, examples, folder, info, logits_of, padded, write  # noqa: F401


def test_equal_examples_share_one_entry(tmp_path):
    rows = examples(4)
    writer = StoredTeacherWriter(tmp_path, INFO)
    write(writer, rows + rows)
    assert finish_store(tmp_path, INFO)["n_examples"] == 4
    inputs = padded([*rows, rows[0]])
    assert writer.add(inputs, logits_of(inputs)) == 0


def test_resumed_equals_uninterrupted(folder, tmp_path, monkeypatch):  # noqa: F811
    rows, broken = examples(), tmp_path / "broken"
    monkeypatch.setattr(storing, "SHARD_BYTES", 1000)
    with pytest.raises(KeyboardInterrupt), StoredTeacherWriter(broken, INFO) as writer:  # noqa: PT012
        for start in (0, 4, 8):
            inputs = padded(rows[start : start + BATCH])
            writer.add(inputs, logits_of(inputs))
        raise KeyboardInterrupt
    (broken / ".shard-0-9-abc.safetensors").write_bytes(b"half")
    with pytest.raises(SlimError, match=r"interrupted.*--resume.*--overwrite"):
        StoredTeacherWriter(broken, INFO)
    again = StoredTeacherWriter(broken, INFO, resume=True)
    assert len(again.keys) == 12
    write(again, rows)
    finished = finish_store(broken, INFO)
    assert len(finished["shards"]) > 2
    assert not list(broken.glob(".*"))
    whole, resumed = StoredTeacher.open(folder), StoredTeacher.open(broken)
    for one, other in zip(whole.top_k(padded(rows)), resumed.top_k(padded(rows)), strict=True):
        assert torch.equal(one, other)
    for name in ("data_fingerprint", "n_examples", "n_answers", "mass_held"):
        assert finished[name] == whole.manifest[name]
    with pytest.raises(SlimError, match="finished store"):
        StoredTeacherWriter(broken, INFO, resume=True)


@pytest.mark.parametrize(
    "change", [{"k": 4}, {"temperature": 1.0}, {"teacher_hash": "x"}, {"tokenizer_hash": "x"}, {"dtype": "bfloat16"}]
)
def test_another_run_is_not_resumed(folder, change):  # noqa: F811
    (folder / "teacher.json").unlink()
    name = next(iter(change))
    with pytest.raises(SlimError, match=rf"made with {name} .*this run has.*--overwrite"):
        StoredTeacherWriter(folder, info(**change), resume=True)
    StoredTeacherWriter(folder, info(teacher="a name for people only"), resume=True)


def test_ranks_write_one_store(folder, tmp_path):  # noqa: F811
    rows, shared = examples(), tmp_path / "shared"
    writers = [StoredTeacherWriter(shared, INFO, rank) for rank in (0, 1)]
    for rank, writer in enumerate(writers):
        write(writer, rows[rank * 12 : (rank + 1) * 12])
    manifest = finish_store(shared, INFO)
    assert [shard["file"] for shard in manifest["shards"]] == ["shard-0-0.safetensors", "shard-1-0.safetensors"]
    one, two = StoredTeacher.open(folder), StoredTeacher.open(shared)
    for mine, theirs in zip(one.top_k(padded(rows)), two.top_k(padded(rows)), strict=True):
        assert torch.equal(mine, theirs)
    assert one.manifest["data_fingerprint"] == manifest["data_fingerprint"]


def test_a_long_run_writes_before_a_shard_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(storing, "FLUSH_SECONDS", 0.0)
    writer = StoredTeacherWriter(tmp_path, INFO)
    inputs = padded(examples(4))
    writer.add(inputs, logits_of(inputs))
    assert [path.name for path in storing.shards_in(tmp_path)] == ["shard-0-0.safetensors"]


def test_wrong_logits_are_refused(tmp_path):
    writer, inputs = StoredTeacherWriter(tmp_path, INFO), padded(examples(4))
    with pytest.raises(SlimError, match=r"shape \(4, 7, 95\).*needs \(4, 7, 96\)"):
        writer.add(inputs, logits_of(inputs)[..., 1:])
    nan = logits_of(inputs)
    nan[~inputs["attention_mask"].bool()] = torch.nan  # logits at padding are not used
    assert writer.add(inputs, nan) == 4
    inputs = padded(examples(4, seed=1))
    with pytest.raises(SlimError, match="NaN"):
        writer.add(inputs, logits_of(inputs) * torch.nan)
    with pytest.raises(SlimError, match="no shards"):
        finish_store(tmp_path / "empty", INFO)


@pytest.mark.parametrize("changes", [{"k": 0}, {"k": 97}, {"per": "word"}, {"temperature": 0.0}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(SlimError, match=next(iter(changes))):
        info(**changes)


def test_hashes_go_by_content():
    keys = [row_key({"input_ids": row})[0] for row in examples()]
    assert len(set(keys)) == len(keys)
    assert data_fingerprint(keys) == data_fingerprint([*keys[::-1], keys[0]])
    assert data_fingerprint(keys) != data_fingerprint(keys[1:])
    tokenizer = tiny.tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(tiny.tokenizer())
    tokenizer.add_tokens(["more"])
    assert tokenizer_hash(tokenizer) != before
    assert model_hash(tiny.llama()) == model_hash(tiny.llama())
    assert model_hash(tiny.llama()) != model_hash(tiny.llama(seed=1))
    assert model_hash(tiny.llama()) != model_hash(tiny.llama().bfloat16())
