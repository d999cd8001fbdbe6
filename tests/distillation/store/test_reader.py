"""A teacher on disk: what is written, what is looked up, and what is refused."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hf_slim import SlimDataError, SlimError, SlimLoadError
from hf_slim.distillation.store.format import StoreInfo, tail_mass
from hf_slim.distillation.store.reader import StoredTeacher, is_stored_teacher
from hf_slim.distillation.store.writer import StoredTeacherWriter, finish_store
from tests import tiny

INFO = StoreInfo(
    k=8, n_classes=tiny.VOCAB_SIZE, per="token", temperature=2.0, dtype="float32", tokenizer_hash="t", teacher_hash="m"
)
BATCH = 4


def info(**changes: object) -> StoreInfo:
    return dataclasses.replace(INFO, **changes)


def examples(rows: int = 24, seed: int = 0) -> list[Tensor]:
    """Token ids of different lengths."""
    ids = tiny.tokens(rows, 15, seed=seed)
    return [row[: 4 + number % 12] for number, row in enumerate(ids)]


def padded(rows: list[Tensor], side: str = "right", more: int = 0) -> dict[str, Tensor]:
    """A batch, padded with a token that is also an ordinary one."""
    length = max(map(len, rows)) + more
    ids, mask = torch.full((len(rows), length), 7), torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[number, place], mask[number, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(inputs: dict[str, Tensor], n_classes: int = tiny.VOCAB_SIZE) -> Tensor:
    """Logits that depend on token and place among the real tokens only, in place of a model."""
    table = torch.randn(16, tiny.VOCAB_SIZE, n_classes, generator=torch.Generator().manual_seed(3)) * 4
    place = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return table[place, inputs["input_ids"]]


def write(writer: StoredTeacherWriter, rows: list[Tensor]) -> None:
    with writer:
        for start in range(0, len(rows), BATCH):
            inputs = padded(rows[start : start + BATCH])
            writer.add(inputs, logits_of(inputs, writer.info.n_classes))


@pytest.fixture
def folder(tmp_path):
    """A finished store of `examples()`."""
    write(StoredTeacherWriter(tmp_path / "store", INFO), examples())
    finish_store(tmp_path / "store", INFO)
    return tmp_path / "store"


def reference(rows: list[Tensor]) -> list[Tensor]:
    """The exact log-probabilities of every example, `(length, n_classes)` in float64."""
    inputs = padded(rows)
    exact = torch.log_softmax(logits_of(inputs).double() / INFO.temperature, -1)
    return [exact[number, : len(row)] for number, row in enumerate(rows)]


def test_predictions_are_the_most_probable_classes_within_fp16(folder):
    store, rows = StoredTeacher.open(folder), examples()
    inputs = padded(rows)
    ids, found = store.top_k(inputs)
    assert ids.shape == found.shape == (inputs["input_ids"].numel(), INFO.k)
    assert ids.dtype == torch.int64
    assert found.dtype == torch.float32
    real = inputs["attention_mask"].flatten().bool()
    exact = torch.cat(reference(rows))
    best = exact.topk(INFO.k).values
    assert ((found[real] - best).abs() <= best.abs() * 2**-11 + 1e-6).all()
    assert (exact.gather(1, ids[real]) - best).abs().max() < 1e-5
    tail = 1 - best.exp().sum(-1)
    assert (tail_mass(found[real]) - tail).abs().max() < 2e-3
    held = store.manifest["mass_held"]
    assert held == pytest.approx(1 - tail.mean().item(), abs=1e-3)
    assert store.manifest["n_examples"] == 24
    assert store.manifest["n_answers"] == len(exact)


def test_padding_has_all_its_mass_in_one_class(folder):
    inputs = padded(examples()[:3])
    ids, found = StoredTeacher.open(folder).top_k(inputs)
    padding = ~inputs["attention_mask"].flatten().bool()
    assert padding.any()
    assert (found[padding].exp().sum(-1) == 1).all()
    assert (tail_mass(found[padding]) == 0).all()
    assert found.isfinite().all()
    assert all(len(row.unique()) == INFO.k for row in ids)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("more", [0, 5])
def test_order_and_padding_do_not_matter(folder, side, more):
    store, rows = StoredTeacher.open(folder), examples()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))[:7].tolist()
    inputs = padded([rows[number] for number in order], side, more)
    _, found = store.top_k(inputs)
    parts = found[inputs["attention_mask"].flatten().bool()].split([len(rows[number]) for number in order])
    for number, part in zip(order, parts, strict=True):
        assert torch.equal(part, store.top_k({"input_ids": rows[number][None]})[1])


def test_a_token_takes_four_bytes_a_class(tmp_path):
    rows = list(torch.randint(0, tiny.VOCAB_SIZE, (40, 256), generator=torch.Generator().manual_seed(0)))
    writer = StoredTeacherWriter(tmp_path, INFO)
    with writer:
        writer.add({"input_ids": torch.stack(rows)}, torch.randn(40, 256, tiny.VOCAB_SIZE))
    n_tokens = finish_store(tmp_path, INFO)["n_answers"]
    assert n_tokens == 40 * 256
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert 4 * INFO.k * n_tokens <= size <= 4 * INFO.k * n_tokens * 1.02


def test_ids_take_the_smallest_type_that_holds_them():
    assert info(n_classes=2**16).id_dtype is torch.uint16
    assert info(n_classes=2**16 + 1).id_dtype is torch.int32


def test_the_largest_class_of_16_bits_is_read_correctly(tmp_path):
    wide = info(n_classes=2**16, k=2)
    logits = torch.zeros(1, 3, 2**16)
    logits[:, :, -1] = 60
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    with StoredTeacherWriter(tmp_path, wide) as writer:
        writer.add(inputs, logits)
    finish_store(tmp_path, wide)
    ids, found = StoredTeacher.open(tmp_path).top_k(inputs)
    assert (ids[:, 0] == 2**16 - 1).all()
    assert (found[:, 0].exp() > 0.999).all()


def test_an_example_may_have_one_prediction(tmp_path):
    classes = info(per="example", n_classes=3, k=3)
    rows = examples(8)
    logits = torch.randn(8, 3)
    with StoredTeacherWriter(tmp_path, classes) as writer:
        writer.add(padded(rows), logits)
    assert finish_store(tmp_path, classes)["n_answers"] == 8
    ids, found = StoredTeacher.open(tmp_path).top_k(padded(rows[::-1], "left", 2))
    exact = torch.log_softmax(logits.flip(0).double() / 2, -1)
    assert (found - exact.gather(1, ids)).abs().max() < 2e-3
    assert (tail_mass(found) < 2e-3).all()


def test_log_probabilities_of_impossible_classes_are_finite(tmp_path):
    few = info(n_classes=4, k=4)
    inputs = {"input_ids": torch.tensor([[1, 2]])}
    with StoredTeacherWriter(tmp_path, few) as writer:
        writer.add(inputs, torch.tensor([[[0.0, 1.0, -torch.inf, -torch.inf], [1e6, 0.0, 0.0, 0.0]]]))
    finish_store(tmp_path, few)
    _, found = StoredTeacher.open(tmp_path).top_k(inputs)
    assert found.isfinite().all()
    assert (found.exp()[0, 2:] == 0).all()


def test_a_row_that_is_not_stored_is_an_error_that_says_what_to_do(folder):
    store = StoredTeacher.open(folder)
    foreign = padded([examples()[0], examples(seed=9)[1]])
    with pytest.raises(SlimDataError, match=r"Example 1 of this batch, 5 tokens.*the 24 examples.*cache-teacher"):
        store.top_k(foreign)
    with pytest.raises(SlimDataError, match="Row 2 of the training data"):
        store.check_data([{"input_ids": row.tolist()} for row in (*examples()[:2], examples(seed=9)[2])])
    unmasked = padded(examples()[:3])["input_ids"]
    with pytest.raises(SlimDataError, match="is not among"):  # without a mask padding is part of the example
        store.top_k({"input_ids": unmasked})
    with pytest.raises(SlimDataError, match=r"attention_mask.*shape"):
        store.top_k({"input_ids": unmasked, "attention_mask": torch.ones(3, 1, 6, 6)})
    with pytest.raises(SlimDataError, match="pixel_values"):
        store.top_k({"input_ids": unmasked, "pixel_values": torch.ones(1)})


def test_data_is_checked_before_training(folder, monkeypatch):
    store = StoredTeacher.open(folder)
    rows = [padded([row], "left", 3) for row in examples()]
    data = [{name: values[0] for name, values in row.items()} for row in rows]
    assert store.check_data(data) == 24
    assert store.check_data([{"input_ids": row.tolist()} for row in examples()]) == 24
    monkeypatch.setattr("hf_slim.distillation.store.reader.CHECKED_ROWS", 5)
    assert store.check_data(data) == 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"n_classes": 97}, "has 96 classes and the student has 97"),
        ({"n_classes": 96, "tokenizer_hash": "other"}, "another tokenizer"),
        ({"n_classes": 96, "temperature": 1.0}, "Set `temperature` to 2.0"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(folder, arguments, says):
    store = StoredTeacher.open(folder)
    store.check(96, "t", 2.0)
    with pytest.raises(SlimError, match=says):
        store.check(**arguments)


def test_a_store_that_is_not_whole_is_refused(folder, tmp_path):
    shard, manifest = folder / "shard-0-0.safetensors", folder / "teacher.json"
    whole, text = shard.read_bytes(), manifest.read_text()
    assert is_stored_teacher(folder)
    shard.write_bytes(whole[:-100])
    with pytest.raises(SlimLoadError, match=rf"shard-0-0.safetensors has {len(whole) - 100} of {len(whole)} bytes"):
        StoredTeacher.open(folder)
    shard.unlink()
    with pytest.raises(SlimLoadError, match=r"shard-0-0.safetensors is missing"):
        StoredTeacher.open(folder)
    shard.write_bytes(b"x" * len(whole))
    with pytest.raises(SlimLoadError, match="is no complete safetensors file"):
        StoredTeacher.open(folder)
    manifest.write_text(text[:50])
    with pytest.raises(SlimLoadError, match="not readable"):
        StoredTeacher.open(folder)
    manifest.write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(SlimLoadError, match="of version 99"):
        StoredTeacher.open(folder)
    manifest.unlink()
    with pytest.raises(SlimLoadError, match=r"unfinished.*--resume"):
        StoredTeacher.open(folder)
    assert is_stored_teacher(folder)
    assert not is_stored_teacher(tmp_path)
    with pytest.raises(SlimLoadError, match="contains no stored teacher"):
        StoredTeacher.open(tmp_path)


def test_shards_are_opened_on_first_use(folder):
    store = StoredTeacher.open(folder)
    assert not store._files
    store.top_k(padded(examples()[:1]))
    assert len(store._files) == 1
    with safe_open(folder / "shard-0-0.safetensors", "pt") as file:
        assert file.get_slice("ids").get_dtype() == "U16"
