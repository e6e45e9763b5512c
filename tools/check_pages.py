# SPDX-License-Identifier: Apache-2.0
"""Fail where a built page would fetch something from a network: python -m tools.check_pages FOLDER.

A link that a reader may follow is no such thing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

# What a browser fetches without a click.
_FETCHED = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "video": "src",
}
_ELSEWHERE = re.compile(r"(?:[a-z]+:)?//", re.IGNORECASE)
_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "style":
                self.fetched += _STYLE.findall(value or "")
            elif name == _FETCHED.get(tag) and _ELSEWHERE.match(value or ""):
                self.fetched.append(value or "")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "style":
            self.fetched += _STYLE.findall(data)


def fetched(file: Path) -> list[str]:
    """The addresses that a browser would fetch for a page or a style sheet."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".css":
        return _STYLE.findall(text)
    page = _Page()
    page.feed(text)
    return page.fetched


def problems(folder: Path) -> Iterator[str]:
    """A line for each page that would fetch something, or for a folder without pages."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".html", ".css"))
    if not files:
        yield f"{folder}: there are no pages"
    for file in files:
        for address in fetched(file):
            yield f"{file}: {address} would be fetched from a network"


def main() -> int:
    found = list(problems(Path(sys.argv[1])))
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
