"""The documentation agrees with the code, and with itself: generated pages, cards, links, tables."""

import importlib.util
import re
from types import ModuleType

import pytest
import yaml

from hf_slim.core.config import SlimConfig
from hf_slim.quantization.scheme import Scheme
from tests.documents import DOCS, PAGES, README, ROOT, TABLE, anchors, links, named, prose, snippets

ONLY_RESULTS_HAVE = re.compile(r"\d+(?:\.\d+)?x\b|\d ?(?:ms|tokens/s|texts/s|MiB)\b|perplexity (?:of )?\d|\d%")


@pytest.fixture(scope="module")
def make_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_what_the_code_gives(make_reference):
    pages = make_reference.pages()
    assert len(pages) >= 12
    for name, content in pages.items():
        assert (DOCS / name).read_text("utf-8") == content, f"docs/{name} is out of date: run `make reference`"
    written = {f"reference/{path.name}" for path in (DOCS / "reference").iterdir()}
    assert written == {name for name in pages if name.startswith("reference/")}


def test_everything_registered_has_a_card_and_every_card_is_filled_in(make_reference):
    cards = {}
    for page in {cards.page for cards in make_reference.CARD_SETS.values()}:
        cards |= make_reference.cards_on((DOCS / "methods" / f"{page}.md").read_text("utf-8"))
    names = {f"{key}/{name}" for key, found in make_reference.CARD_SETS.items() for name in found.entries}
    assert len(names) > 30
    assert set(cards) == names
    for name, text in cards.items():
        use, composes = re.findall(r"\*\*(?:Use when|Composes with):\*\* (.+)", text)
        assert len(use.split()) > 4, name
        assert composes, name
    for page in (DOCS / "methods").iterdir():
        assert make_reference.TO_WRITE not in page.read_text("utf-8"), page


def test_a_new_entry_gets_a_card_to_be_filled_in(make_reference, monkeypatch):
    criteria = make_reference.CARD_SETS["criteria"].entries
    monkeypatch.setitem(criteria._entries, "another", criteria["l1"])
    page = make_reference.pages()["methods/criteria.md"]
    assert f"## another\n\n<!-- facts: criteria/another -->\n{criteria['l1'].score.__doc__[:30]}" in page
    assert make_reference.TO_WRITE in make_reference.cards_on(page)["criteria/another"]


def test_a_card_names_its_results_where_there_are_some(make_reference, monkeypatch, tmp_path):
    (tmp_path / "pruning_criteria.json").write_text("{}")
    monkeypatch.setattr(make_reference, "RESULTS", tmp_path)
    pages = make_reference.pages()
    assert pages["methods/criteria.md"].count("Measured: ") == len([*make_reference.CARD_SETS["criteria"].entries])
    assert "Measured: " not in pages["methods/grids.md"]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file(), f"{target} on {named(page)}"
        assert not anchor or anchor in anchors(there), f"{target} on {named(page)}"


def test_every_page_is_within_two_clicks_of_the_readme():
    reached = {README}
    for _ in range(2):
        reached |= {(page.parent / target.partition("#")[0]).resolve() for page in reached for target in links(page)}
    assert {page.resolve() for page in PAGES} <= {page.resolve() for page in reached}


def test_the_site_lists_every_page():
    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [file for part in (entry.values() if isinstance(entry, dict) else entry) for file in files(part)]

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert sorted(files(settings["nav"])) == sorted(str(page.relative_to(DOCS)) for page in PAGES if page != README)


def test_the_table_of_schemes_counts_as_the_code_does():
    rows = re.findall(
        r"^\| `([\w.-]+)` \|.*\| ([\d.]+) \|$", (DOCS / "guides/quantization.md").read_text("utf-8"), re.M
    )
    assert len(rows) == 14
    for name, bits in rows:
        assert f"{Scheme.parse(name).weights.bits_per_value(576):.2f}" == bits, name


def test_the_table_of_versions_is_that_of_the_constraints():
    constraints = dict(
        re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    )
    rows = re.findall(r"^\| ([\w-]+) \| ([\d., ]+) \|", (DOCS / "compatibility.md").read_text("utf-8"), re.MULTILINE)
    packages = {name: versions.split(", ") for name, versions in rows if name != "Python"}
    assert len(packages) >= 9
    for name, versions in packages.items():
        assert constraints[name] in versions, name


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "benchmarks.md"], ids=named)
def test_numbers_that_were_measured_come_from_results(page):
    assert not ONLY_RESULTS_HAVE.search(TABLE.sub("", prose(page)))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_yaml_on_a_page_is_yaml(page):
    from hf_slim.recipe import SECTIONS

    for code in snippets(page, "yaml"):
        for name, values in yaml.safe_load(code).items():
            config: type[SlimConfig] | None = SECTIONS.get(name)
            assert config is None or config.from_dict(values)


def test_the_readme_has_the_tables_that_are_filled_from_results():
    assert re.findall(r"<!-- table: (\w+) -->", README.read_text("utf-8")) == ["quickstart", "peers"]
