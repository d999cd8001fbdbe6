import json

import pytest
from datasets import Dataset
from datasets.arrow_dataset import Column
from tokenizers.processors import TemplateProcessing

from hf_slim import SlimDataError, SlimError, data
from hf_slim.data import DataConfig, load_held_out, load_texts, text_blocks
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


def splits_in(folder, *names):
    for name in names:
        write(folder / f"{name}.jsonl", [f"{name} {number}" for number in range(20)])
    return str(folder)


def test_a_test_split_is_held_out_whole_where_there_is_no_validation_split(tmp_path):
    config = DataConfig(source=splits_in(tmp_path, "train", "test"))
    train, held_out = load_texts(config)
    assert list(train["text"]) == [f"train {number}" for number in range(20)]
    assert list(held_out["text"]) == [f"test {number}" for number in range(20)]
    assert list(load_held_out(config)["text"]) == list(held_out["text"])


def test_a_validation_split_comes_before_a_test_split_and_a_name_before_both(tmp_path):
    source = splits_in(tmp_path, "train", "test", "validation")
    assert load_texts(DataConfig(source=source))[1]["text"][0] == "validation 0"
    assert load_texts(DataConfig(source=source, evaluation_split="test"))[1]["text"][0] == "test 0"
    with pytest.raises(SlimError, match=r"has no split 'dev'\. It has"):
        load_texts(DataConfig(source=source, evaluation_split="dev"))


@pytest.mark.parametrize(
    ("name", "is_whole"),
    [("test", True), ("sst2-dev", True), ("my_eval_1", True), ("latest", False), ("values", False), ("train", False)],
)
def test_a_file_named_like_a_held_out_set_is_measured_whole(name, is_whole, tmp_path):
    texts = [f"text {number}" for number in range(200)]
    config = DataConfig(source=write(tmp_path / f"{name}.jsonl", texts))
    found = list(load_held_out(config)["text"])
    assert (found == texts) == is_whole
    assert is_whole or found == list(load_texts(config)[1]["text"])


@pytest.mark.parametrize("adds_beginning", [True, False])
def test_blocks_begin_as_the_tokenizer_begins_a_text(adds_beginning):
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    if adds_beginning:
        token = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, tokenizer.bos_token_id)]
        )
    texts = Dataset.from_dict({"text": ["a b c d e f g " * 10, "h i j " * 20]})
    blocks = text_blocks(texts, tokenizer, DataConfig(block_size=8), 10, 0, "t")["input_ids"]
    assert len(blocks) == 10
    assert all(len(block) == 8 for block in blocks)
    starts = {block[0] for block in blocks}
    assert (starts == {tokenizer.bos_token_id}) == adds_beginning
    plain = text_blocks(texts, tiny.tokenizer(), DataConfig(block_size=8), 10, 0, "t")["input_ids"]
    joined = [token for block in blocks for token in (block[1:] if adds_beginning else block)]
    assert joined == [token for block in plain for token in block][: len(joined)]
