import pytest

from hf_slim.core.report import as_markdown, as_text, improvement, notes, notes_on_base, ratios, write_atomically


def report(**result):
    base = {"quality": {"perplexity": 8.0}, "inference": {"decode_tokens_per_s": {"median": 10, "low": 9, "high": 12}}}
    built = {
        "title": "t", "base": base | {"prompt_and_completion": "a"}, "result": result | {"prompt_and_completion": "b"},
        "layers": [{"scheme": None, "reason": "ignored"}], "environment": {"torch": "2"}, "recipe": {},
    }  # fmt: skip
    return built | {"ratios": ratios(built)}


def test_more_tokens_a_second_and_less_perplexity_are_both_better():
    assert improvement(8.0, 4.0, smaller_is_better=True) == 2
    assert improvement({"median": 10}, {"median": 20}, smaller_is_better=False) == 2


def test_what_was_not_measured_is_said():
    text = as_text(report(quality={"perplexity": 10.0}))
    assert "not measured" in text
    assert "0.80x" in text
    assert "prefill" not in text


def test_markdown_says_why_a_layer_stays_float():
    assert "float: ignored" in as_markdown(report())


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "report.json").write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "report.json", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_a_model_that_writes_no_text_is_reported_without_any():
    made = report(quality={"accuracy": 0.9}) | {"notes": ["The base is another one."]}
    for side in ("base", "result"):
        del made[side]["prompt_and_completion"]
    made["base"]["quality"] = {"accuracy": 0.8}
    made["ratios"] = ratios(made)
    for text in (as_text(made), as_markdown(made)):
        assert "80.00%" in text
        assert "1.12x" in text  # more is better
        assert "The base is another one." in text
    assert "same prompt" not in as_markdown(made)


def test_a_note_says_what_a_throughput_is_of():
    speed = {"samples_per_s": {"median": 5, "low": 4, "high": 6}, "batch_size": 8, "tokens_per_sample": 64}
    assert notes(report(inference=speed)) == ["Throughput: batches of 8 x 64 tokens, unpadded."]
    assert notes(report()) == []


def test_attention_has_a_row_of_its_own_whose_length_is_noted():
    made = report(compute={"attention_multiply_adds_per_token": 2e6, "attention_length": 256})
    assert "256 tokens" in notes(made)[0]
    assert "2.0 M" in as_text(made)
    assert "attention" not in as_text(report(compute={"multiply_adds_per_token": 3e6}))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (98_400_000, "1.22x the size of those"),
        (200_000_000, "1.67x smaller than those"),
        (541_000_000, None),
        (None, None),
    ],
)
def test_the_file_that_was_given_is_named_where_it_is_smaller_than_the_base_as_measured(source, says):
    made = report(memory={"disk_bytes": 120_000_000})
    made["base"]["memory"] = {"disk_bytes": 541_600_000}
    made["sources"] = {"model": {"bytes": source}}
    found = [note for note in notes_on_base(made) if "was loaded from" in note]
    assert len(found) == (says is not None)
    assert all(says in note and "541.6 MB" in note for note in found)


def test_texts_are_laid_out_for_a_terminal_and_a_file():
    lines = as_text(report(quality={"perplexity": 10.0})).splitlines()
    assert set(lines[1]) == {"-"}
    assert len(lines[1]) == len(lines[0]) == len(lines[2])
    assert as_markdown(report()).endswith("\n")
    assert not as_markdown(report()).endswith("\n\n")
