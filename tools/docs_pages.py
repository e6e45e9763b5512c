# SPDX-License-Identifier: Apache-2.0
"""Write the pages of docs/ that are made of code and records: python -m tools.docs_pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools import (
    api_page,
    command_line_page,
    configuration_page,
    options_table,
    support_page,
    versions_page,
)

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES: dict[str, Callable[[], str]] = {
    "api.md": api_page.page,
    "command-line.md": command_line_page.page,
    "configuration.md": configuration_page.page,
    "options.md": options_table.page,
    "support.md": support_page.page,
    "versions.md": versions_page.page,
}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
