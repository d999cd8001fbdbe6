"""Renders every benchmark table from `results/*.json`: `docs/benchmarks.md`, and the tables between markers elsewhere.

    python recipes/benchmarks/tables.py            # what `make tables` runs
    python recipes/benchmarks/tables.py --check    # exit status 1 if a committed table is another one

A marker is a pair of lines, `<!-- table: NAME -->` and `<!-- /table -->`, in README.md or a page of docs/.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.results import FOLDER, load, values_of
from rendering import overview
from rendering.markdown import Rows
from rendering.page import PAGE_SECTIONS, page

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- /table -->)", re.DOTALL)
# name of a table -> file of its results, function that renders it
TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    name: (file, render) for section in PAGE_SECTIONS for name, file, render in section.tables
}


def rendered(contents: dict[str, Any]) -> dict[str, str]:
    """Every table by name; empty where nothing was measured.

    Args:
        contents: Name of a results file -> its content.
    """
    rows = {name: values_of(content) for name, content in contents.items()}
    return {name: render(rows.get(file, {})) for name, (file, render) in TABLES.items()} | {
        "peers": overview.peers(rows)
    }


def filled(text: str, tables: dict[str, str]) -> str:
    """The text with every table between markers rendered.

    Raises: SystemExit: if a marker names a table that does not exist.
    """

    def fill(match: re.Match[str]) -> str:
        if match["name"] not in tables:
            raise SystemExit(f"There is no table '{match['name']}'. There are {', '.join(sorted(tables))}.")
        body = tables[match["name"]]
        return f"{match[1]}{body}{chr(10) if body else ''}{match[4]}"

    return MARKED.sub(fill, text)


def documents(contents: dict[str, Any]) -> dict[Path, str]:
    """Every file that holds a table, as it has to be."""
    tables = rendered(contents)
    marked = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path != PAGE]
    return {path: filled(path.read_text(), tables) for path in marked} | {PAGE: page(contents, tables)}


def all_results(folder: Path = FOLDER) -> dict[str, Any]:
    """Name -> content of every file of results."""
    return {path.stem: load(path) for path in sorted(folder.glob("*.json"))}


def main() -> None:
    """Writes, or checks, every document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is another one")
    options = parser.parse_args()
    stale = {path: text for path, text in documents(all_results()).items()
             if not path.exists() or path.read_text() != text}  # fmt: skip
    for path, text in stale.items():
        print(f"{'differs' if options.check else 'wrote'}: {path.relative_to(ROOT)}")
        if not options.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    if options.check and stale:
        sys.exit("Run `make tables`.")


if __name__ == "__main__":
    main()
