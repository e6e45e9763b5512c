# SPDX-License-Identifier: Apache-2.0
"""The fenced blocks of the README and of docs/, and which of them are marked as fragments.

A block that no test runs has ``<!-- fragment: why -->`` on a line before it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# What is no code: output, drawings, signatures.
PLAIN = "text"
_FRAGMENT = re.compile(r"<!-- fragment: (.+) -->")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: the page it is on, the heading before it, its place among those of its
    language under that heading, its language, its text, and why it is a fragment, or ""."""

    page: str
    heading: str
    index: int
    language: str
    text: str
    fragment: str = ""

    @property
    def place(self) -> str:
        """As "training.md: Saving", with a number from the second block on."""
        number = f" {self.index + 1}" if self.index else ""
        return f"{self.page}: {self.heading}{number}"


def blocks_of(text: str, page: str) -> Iterator[Block]:
    """The fenced blocks of a page in Markdown."""
    tokens = MarkdownIt().enable("table").parse(text)
    heading, reason = "", ""
    counts: dict[tuple[str, str], int] = {}
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "inline" and before is not None and before.type == "heading_open":
            heading = token.content
        elif token.type == "html_block":
            found = _FRAGMENT.fullmatch(token.content.strip())
            reason = found[1] if found else ""
            continue
        elif token.type == "fence":
            key = heading, token.info
            index = counts.get(key, 0)
            counts[key] = index + 1
            yield Block(page, heading, index, token.info, token.content, reason)
        reason = ""


def all_blocks() -> list[Block]:
    """The blocks of all pages."""
    return [
        block
        for page in PAGES
        for block in blocks_of(page.read_text(), page.relative_to(ROOT).as_posix())
    ]
