# SPDX-License-Identifier: Apache-2.0
"""How Sphinx makes HTML of these pages, which are plain Markdown: ``make docs``.

The source folder is that of the repository, so that links between docs/ and the files beside it
are the same here and on a code host. Nothing in the HTML is fetched from a network.
"""

import re
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)\)")

project = "deepspeed-autotp"
version = release = metadata.version(project)
author = "the authors of deepspeed-autotp"

extensions = ["myst_parser"]
include_patterns = [
    "docs/*.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "csrc/README.md",
]
# Folders that need not be looked through.
exclude_patterns = [".*", "build", "dist", "deepspeed_autotp", "tests", "demo-output"]
root_doc = "docs/README"
myst_heading_anchors = 4
myst_linkify_fuzzy_links = False

html_theme = "furo"
html_title = f"{project} {version}"
html_copy_source = False
html_show_sourcelink = False
templates_path = ["_templates"]
html_additional_pages = {"index": "index.html"}


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _prepare)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _prepare(app: Sphinx, name: str, content: list[str]) -> None:
    """Links to folders, which have no page, become their text; the index gets the side bar."""
    folder = (ROOT / name).parent
    text = _LINK.sub(lambda link: link[1] if (folder / link[2]).is_dir() else link[0], content[0])
    if name == root_doc:
        pages = [each for _, each in _LINK.findall(text) if each.endswith(".md")]
        listed = "\n".join(["../README.md", *pages, "../csrc/README.md"])
        text += f"\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    content[0] = text
