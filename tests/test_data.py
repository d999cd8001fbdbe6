import json

import pytest
from datasets import Dataset
from datasets.arrow_dataset import Column

from hf_slim import SlimDataError, SlimError, data
from hf_slim.data import DataConfig, load_texts, text_blocks
from tests import tiny


def write(path, texts, column="text"):
    path.write_text("\n".join(json.dumps({column: text}) for text in texts))
    return str(path)


def test_the_standard_library_splits_the_same_way_every_time():
    train, held_out = load_texts(DataConfig())
    assert len(train) > 5 * len(held_out) > 0
    assert not set(train["text"]) & set(held_out["text"])
    assert load_texts(DataConfig())[1]["text"] == held_out["text"]
    assert all(text.startswith("# ") for text in train["text"][:20])


def test_a_source_without_a_held_out_split_keeps_some_back(tmp_path):
    texts = [f"text number {i}" for i in range(200)]
    train, held_out = load_texts(DataConfig(source=write(tmp_path / "a.jsonl", texts)))
    assert sorted([*train["text"], *held_out["text"]]) == sorted(texts)
    assert 5 <= len(held_out) <= 40


def test_a_folder_with_its_own_splits_is_taken_as_it_is(tmp_path):
    write(tmp_path / "train.jsonl", ["a", "b"], "body")
    write(tmp_path / "validation.jsonl", ["c"], "body")
    train, held_out = load_texts(DataConfig(source=str(tmp_path), text_column="body"))
    assert (list(train["body"]), list(held_out["body"])) == (["a", "b"], ["c"])


def test_blocks_are_consecutive_text_of_one_length():
    texts = Dataset.from_dict({"text": ["abcdefgh" * 10] * 3})
    blocks = text_blocks(texts, tiny.tokenizer(), DataConfig(block_size=16), 9, seed=0, title="t")
    assert len(blocks) == 9
    assert all(len(ids) == 16 for ids in blocks["input_ids"])
    assert blocks["labels"] == blocks["input_ids"]
    joined = [token for ids in blocks["input_ids"] for token in ids]
    assert joined.count(tiny.tokenizer().eos_token_id) == 1  # one end of text within the first 144 tokens


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"source": "nothing.jsonl"}, "does not exist"),
        ({"source": "/nothing"}, "does not exist"),
        ({"block_size": 1}, "at least 8"),
    ],
)
def test_a_source_that_is_not_there_is_refused(config, says):
    with pytest.raises(SlimError, match=says):
        load_texts(DataConfig(**config))


def test_a_file_without_the_column_lists_what_it_has(tmp_path):
    with pytest.raises(SlimDataError, match=r"no column 'text'.*It has body"):
        load_texts(DataConfig(source=write(tmp_path / "a.jsonl", ["x", "y"], "body")))


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(SlimDataError, match=r"\.parquet"):
        load_texts(DataConfig(source=str(tmp_path / "a.docx")))


def test_documents_that_begin_alike_are_split_all_the_same(tmp_path):
    texts = [f"Below is an instruction.\n{i}" for i in range(200)]
    train, held_out = load_texts(DataConfig(source=write(tmp_path / "a.jsonl", texts)))
    assert len(train) > len(held_out) >= 5


def test_a_source_may_name_an_environment_variable(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", [f"text {i}" for i in range(50)])
    monkeypatch.setenv("HERE", str(tmp_path))
    assert len(load_texts(DataConfig(source="$HERE/a.jsonl"))[0]) > 30
    monkeypatch.delenv("HERE")
    with pytest.raises(SlimDataError, match=r"variable HERE is not set.*data\.source="):
        load_texts(DataConfig(source="${HERE}/a.jsonl"))


def test_columns_stay_together_when_some_documents_are_held_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {i}", "label": i}) for i in range(60)))
    for split in load_texts(DataConfig(source=str(path)), ["text", "label"]):
        assert list(split["text"]) == [f"text {i}" for i in split["label"]]
    with pytest.raises(SlimDataError, match=r"no column 'kind'.*`data\.label_column`"):
        load_texts(DataConfig(source=str(path), label_column="kind"), ["text", "kind"])
    with pytest.raises(SlimDataError, match="'stdlib' has only text"):
        load_texts(DataConfig(), ["text", "label"])


def test_a_source_is_read_and_split_once_while_reading_once_is_open(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {i}", "title": f"{i}", "label": i}) for i in range(60)))
    reads = counted(monkeypatch, "load_dataset", "_split")
    config, other = DataConfig(source=str(path)), DataConfig(source=str(path), block_size=64)
    alone = [load_texts(config), load_texts(config)]
    assert reads == ["load_dataset", "_split"] * 2
    reads.clear()
    with data.reading_once():
        first = load_texts(config)
        with data.reading_once():  # what a run calls may open it too
            assert all(one is two for one, two in zip(first, load_texts(other), strict=True))
        assert load_texts(config, ["text", "label"])[1] is first[1]
        with pytest.raises(SlimDataError, match="no column 'kind'"):
            load_texts(DataConfig(source=str(path), label_column="kind"), ["text", "kind"])
        assert reads == ["load_dataset", "_split"]
        load_texts(DataConfig(source=str(path), evaluation_split="test"))
        load_texts(DataConfig(source=str(path), text_column="title"))
        assert reads == ["load_dataset", "_split"] * 3
    load_texts(config)
    assert reads == ["load_dataset", "_split"] * 4
    assert [list(split["text"]) for split in alone[0]] == [list(split["text"]) for split in first]


def counted(monkeypatch, *names):
    """Names of functions of `hf_slim.data`, each time that one is called from now on."""
    calls = []

    def count(name, original):
        return lambda *arguments, **keywords: calls.append(name) or original(*arguments, **keywords)

    for name in names:
        monkeypatch.setattr(data, name, count(name, getattr(data, name)))
    return calls


def test_splitting_a_source_does_not_make_a_list_of_its_column(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", [f"text {i}" for i in range(200)])
    given, original = [], data._split
    monkeypatch.setattr(data, "_split", lambda rows, names: given.append(names) or original(rows, names))
    load_texts(DataConfig(source=source))
    assert isinstance(given[0], Column)
