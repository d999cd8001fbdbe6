"""Committed tables are what the committed results give, and README holds no measured number besides."""

import re

import pytest
import tables
from rendering import overview
from rendering.markdown import number, ratio, table

from tests.recipes.scripts import BENCHMARKS, ROOT

UNITS = r"(?:x|%|ms|s|[KMG]i?B|M|tokens/s|texts/s|samples/s)"
MEASURED = re.compile(rf"(?<![\w.-])[<>+-]?\d[\d,]*(?:\.\d+)? ?{UNITS}(?![\w/])|(?<![\w.])\d+\.\d{{2,}}(?![\w.])")


def measured_tables(text: str) -> list[str]:
    """Lines of tables with measured numbers, outside of markers; code and defaults in brackets do not count."""
    outside = tables.MARKED.sub("", text)
    lines = [line for line in outside.splitlines() if line.startswith("|")]
    return [line for line in lines if MEASURED.search(re.sub(r"`[^`]*`|\([^)]*\)", "", line))]


def test_the_committed_tables_are_what_the_results_give():
    documents = tables.documents(tables.all_results())
    assert tables.PAGE in documents
    stale = [str(path.relative_to(ROOT)) for path, text in documents.items() if path.read_text() != text]
    assert not stale, "Run `make tables`."


def test_readme_has_no_table_of_measured_numbers_outside_of_markers():
    assert measured_tables((ROOT / "README.md").read_text()) == []


@pytest.mark.parametrize(
    ("line", "is_measured"),
    [
        ("| prefill | 409.5 ms | 2.50x |", True),
        ("| accuracy | 88.42 |", True),
        ("| files | 116.4 MB |", True),
        ("| removed | 20% |", True),
        ("| memory | +2.5% |", True),
        ("| `pruning` | `sparsity` (ffn: 0.5), `start` (0.05) | scored while training |", False),
        ("| `w4a16` | integers of 2 to 8 bits | NF4 |", False),
        ("| quickstart | all three techniques on SmolLM2-135M |", False),
        ("<!-- table: quickstart -->\n| prefill | 409.5 ms | 2.50x |\n<!-- /table -->", False),
    ],
)
def test_a_measured_number_is_recognised(line, is_measured):
    assert bool(measured_tables(line)) is is_measured


def test_every_file_of_results_has_a_table():
    files = {path.stem for path in (BENCHMARKS / "results").glob("*.json")}
    assert files
    assert files - {"distillation_quality_trial"} <= {file for file, _ in tables.TABLES.values()}


def test_what_stands_between_markers_is_replaced_and_a_missing_result_renders_as_nothing():
    text = "before\n<!-- table: one -->\nold\n<!-- /table -->\nbetween\n<!-- table: two -->\n<!-- /table -->\n"
    found = tables.filled(text, {"one": "| new |", "two": ""})
    assert found == text.replace("old", "| new |")
    assert tables.filled(found, {"one": "", "two": ""}) == text.replace("old\n", "")
    with pytest.raises(SystemExit, match=r"no table 'two'\. There are one"):
        tables.filled(text, {"one": ""})


def test_a_row_of_peers_without_a_result_is_left_out():
    rows = {"float": {"perplexity": 2.5}, "w3a16 torchao": {"perplexity": 3.5}, "w3a16 hf_slim": {"perplexity": 3.25}}
    found = overview.peers({"quantization_quality": rows}).splitlines()
    assert len(found) == 3
    assert found[2].endswith("| torchao QAT | 3.500 | 3.250 |")
    assert overview.peers({"quantization_quality": {name: rows[name] for name in ("float", "w3a16 hf_slim")}}) == ""


def test_all_tables_render_without_any_result():
    assert set(tables.rendered({}).values()) == {""}


def test_numbers_show_their_spread():
    assert number(None) == "-"
    assert number(2.0, "{:.1f} ms") == "2.0 ms"
    assert number({"median": 2.0, "low": 1.0, "high": 4.0}, "{:.1f} ms") == "2.0 ms [1.0, 4.0]"
    assert ratio({"median": 3.0}, 2.0) == "1.50x"
    assert table(["a", "b"], []) == ""
