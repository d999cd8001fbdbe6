"""Writes what is generated in the documentation: docs/reference/ from the configs, and the facts on the method cards.

    make reference        # or: python docs/make_reference.py

A card in docs/methods/ has a generated block, between `<!-- facts: SET/NAME -->` and `<!-- /facts -->`, and text by
hand below it. Something that was registered without a card gets a skeleton to be filled in.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_slim.core.registry import Registry
from hf_slim.distillation.losses.attention import map_loss, relation_loss
from hf_slim.distillation.losses.divergences import DIVERGENCES
from hf_slim.distillation.losses.hidden_states import HIDDEN_LOSSES
from hf_slim.pruning.config import DEFAULT_CRITERIA
from hf_slim.pruning.importance.criteria import CRITERIA, Criterion
from hf_slim.quantization.grids.grid import GRIDS, Grid, GridKind
from hf_slim.quantization.grids.observers import OBSERVERS
from hf_slim.quantization.scheme import SCHEMES
from hf_slim.workflows.settings import settings_reference
from hf_slim.workflows.settings.setting import doc_of

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "recipes" / "benchmarks" / "results"
TO_WRITE = "to be written"
SKELETON = f"**Use when:** {TO_WRITE}.\n\n**Composes with:** {TO_WRITE}."
Facts = dict[str, str]  # what is stated -> the statement, as Markdown


@dataclass(frozen=True)
class CardSet:
    """Cards of one kind: one for every name.

    Attributes:
        page: File in docs/methods/, without its ending.
        entries: What is registered, by name.
        facts: `(name, entry)` -> what the code says of it, beside its docstring.
        results: The benchmark that compares them: a file in recipes/benchmarks/results/, without its ending.
    """

    page: str
    entries: Registry | Mapping[str, Any]
    facts: Callable[[str, Any], Facts]
    results: str | None = None


def _criterion_facts(name: str, criterion: Criterion) -> Facts:
    needs = ["gradients of a loss"] if criterion.needs_gradient else []
    needs += ["activations"] if criterion.sums else []
    needs += ["inputs and outputs of whole layers"] if criterion.needs_angular_distance else []
    kinds = [f"`{kind}`" for kind, default in DEFAULT_CRITERIA.items() if default == name]
    scored = "every kind of structure"
    if criterion.sums:
        scored = "neurons, heads, channels and the hidden width; not layers, blocks or anything of fused experts"
    if criterion.needs_angular_distance:
        scored = "whole layers only"
    return {
        "Setting": f"`pruning: {{criterion: {name}}}`",
        "Needs": ", ".join(needs) or "weights only",
        "Scores": scored,
        "Across layers": "scores are compared as they are" if criterion.comparable else "scores are first divided by "
        "the mean of their layer",
    } | ({"Default for": ", ".join(kinds)} if kinds else {})  # fmt: skip


def _grid_facts(name: str, kind: GridKind) -> Facts:
    schemes = [scheme for scheme in SCHEMES if SCHEMES[scheme].weights.kind == name]
    by_name = [f"`quantization: {{scheme: {schemes[0]}}}`"] if schemes else []
    bits = sorted(kind.bits)
    stored = [f"{kind.storage_bits(Grid(name, size)):g}" for size in bits]
    return {
        "Setting": ", or ".join([*by_name, f'in full `Grid("{name}")`']),
        "Schemes": ", ".join(f"`{scheme}`" for scheme in schemes) or "none by name",
        "Bits": ", ".join(map(str, bits)),
        "Bits on disk": f"{', '.join(stored)} for each code, scales not included",
        "Zero is on the grid": "yes" if kind.holds_zero else "not always: the values are trained",
    }


def _setting(text: str) -> Callable[[str, Any], Facts]:
    """The only fact: how it is set. `NAME` in `text` stands for the name."""
    return lambda name, _: {"Setting": f"`{text.replace('NAME', name)}`"}


ATTENTION_LOSSES = {"relations": relation_loss, "maps": map_loss}
CARD_SETS = {
    "criteria": CardSet("criteria", CRITERIA, _criterion_facts, "pruning_criteria"),
    "grids": CardSet("grids", GRIDS, _grid_facts, "quantization_quality"),
    "observers": CardSet("observers", OBSERVERS, _setting("quantization: {observer: NAME}")),
    "divergences": CardSet("losses", DIVERGENCES, _setting("distillation: {losses: NAME}"), "distillation_quality"),
    "hidden": CardSet("losses", HIDDEN_LOSSES, _setting("distillation: {hidden: {loss: NAME}}")),
    "attention": CardSet("losses", ATTENTION_LOSSES, _setting("distillation: {attention: {loss: NAME}}")),
}


def pages() -> dict[str, str]:
    """Every page with generated parts: its path below docs/ -> what it must hold."""
    made = {f"reference/{name}": content for name, content in settings_reference().items()}
    for name, cards in CARD_SETS.items():
        path = f"methods/{cards.page}.md"
        text = made[path] if path in made else (DOCS / path).read_text("utf-8")
        for entry in cards.entries:
            text = _with_facts(text, f"{name}/{entry}", entry, _facts_block(cards, entry))
        made[path] = text
    return made


def cards_on(text: str) -> dict[str, str]:
    """The cards of a page: "SET/NAME" -> what is written below its facts by hand."""
    parts = re.split(r"<!-- facts: (\S+) -->.*?<!-- /facts -->", text, flags=re.DOTALL)[1:]
    hand = [part.partition("\n## ")[0].partition("\n# ")[0].strip() for part in parts[1::2]]
    return dict(zip(parts[::2], hand, strict=True))


def _with_facts(text: str, key: str, name: str, block: str) -> str:
    begin, end = f"<!-- facts: {key} -->\n", "<!-- /facts -->"
    if begin not in text:
        return f"{text.rstrip()}\n\n## {name}\n\n{begin}{block}{end}\n\n{SKELETON}\n"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}{block}{end}{rest.partition(end)[2]}"


def _facts_block(cards: CardSet, name: str) -> str:
    entry = cards.entries[name]
    doc = doc_of(entry)
    about = re.split(r"\s*\b(?:Source|Args):", doc, maxsplit=1)[0]
    source = re.search(r"Source:\s*(.+?)(?=\n\n|\n\w+:|\Z)", doc, re.DOTALL)
    facts = cards.facts(name, entry)
    facts["Source"] = " ".join(source[1].split()) if source else TO_WRITE
    if cards.results and (RESULTS / f"{cards.results}.json").is_file():
        facts["Measured"] = f"[benchmarks](../benchmarks.md), from `recipes/benchmarks/results/{cards.results}.json`"
    lines = [f"- {title}: {fact.rstrip('.')}." for title, fact in facts.items()]
    return "\n".join([about, "", *lines, ""])


def main() -> None:
    for name, content in pages().items():
        path = DOCS / name
        if not path.is_file() or path.read_text("utf-8") != content:
            draft = path.with_suffix(".new")
            draft.write_text(content, "utf-8")
            draft.replace(path)
            print(f"written: {path}")


if __name__ == "__main__":
    main()
