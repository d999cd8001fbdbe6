"""README and the pages of the documentation, and what is written in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"<!-- table: ([\w-]+) -->.*?<!-- /table -->", re.DOTALL)


def named(page: Path) -> str:
    """A page's path in the repository, to name a test case."""
    return str(page.relative_to(ROOT))


def snippets(page: Path, language: str) -> list[str]:
    """The blocks of code of a page in one language."""
    return [code for name, code in FENCE.findall(page.read_text("utf-8")) if name == language]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text("utf-8"))


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `hf-slim` command line of a page, by any launcher."""
    found = []
    for code in snippets(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["hf-slim"]:
                found.append(words[1:])
            elif "hf_slim.cli" in words:
                found.append(words[words.index("hf_slim.cli") + 1 :])
    return found


def links(page: Path) -> list[str]:
    """The targets of a page's links that lead into the repository."""
    found = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}
