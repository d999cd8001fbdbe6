"""The card of a model: README.md, made from the report and nothing else. The same report gives the same bytes."""

import hashlib
import re
from typing import Any

from hf_slim.hub.facts import Report, saved_of
from hf_slim.hub.loading import loading_section
from hf_slim.hub.metadata import metadata
from hf_slim.hub.sections import (
    completions_section,
    done_section,
    headline,
    layers_section,
    limits_section,
    measures_section,
    reproduce_section,
    sources_section,
)

# says that nobody has changed the text since; the digest is of everything before this line
MARK = "<!-- Made by hf_slim from report.json. SHA-256 of the text above: {} -->\n"
MARKED = re.compile(r"<!-- Made by hf_slim from report\.json\. SHA-256 of the text above: (\w+) -->\n")


def render_card(
    report: Report,
    name: str,
    has_picture: bool = False,
    revision: str | None = None,
    extra: dict[str, Any] | None = None,
) -> str:
    """The text of README.md.

    Args:
        report: As in report.json.
        name: What snippets load: the name of the folder, or `user/name` on the Hub.
        has_picture: Whether report.png lies beside the card.
        revision: Of the Hub repository; None: its main branch.
        extra: Fields for the header that the report says nothing about; tags are joined.
    """
    short = name.rpartition("/")[2]
    parts = [
        f"# {short}",
        f"**{headline(report)}**",
        done_section(report),
        loading_section(saved_of(report), name, revision),
        measures_section(report),
        "![Base and result side by side](report.png)" if has_picture else "",
        completions_section(report),
        layers_section(report),
        limits_section(report),
        sources_section(report),
        reproduce_section(report, name),
    ]
    body = "\n\n".join(part for part in parts if part)
    return _marked(f"---\n{metadata(report, short, extra)}\n---\n\n{body}\n\n")


def is_marked(text: str) -> bool:
    """Whether hf_slim wrote a card, edited since or not."""
    return MARKED.search(text) is not None


def is_untouched(text: str) -> bool:
    """Whether a card is as hf_slim wrote it, so that it may be written again; False once somebody has edited it."""
    found = MARKED.search(text)
    return found is not None and found.end() == len(text) and found[1] == _digest(text[: found.start()])


def _marked(text: str) -> str:
    return text + MARK.format(_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
