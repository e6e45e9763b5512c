# SPDX-License-Identifier: Apache-2.0
"""What the README and the pages of docs/ say, where code can contradict it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.step_chart import chart
from deepspeed_autotp import TPLayerSpec, TPTrainingConfig, get_tensor_parallel_config
from tools.configuration_page import as_json, fields
from tools.draw_decoder_block import drawing

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md")
PAGES = [README, *(ROOT / name for name in BESIDE), *sorted(DOCS.glob("*.md"))]
MAX_LINES = 180
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CONFIGURATION = re.compile(r"^```json\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KEY_ROW = re.compile(r"^\| `(\w+)` \| .+ \|$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> Iterator[str]:
    """The links to files or headings that are not there."""
    for link in LINK.findall(FENCE.sub("", text)):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            yield link


def test_pages_have_no_conflicts_of_a_merge() -> None:
    marked = re.compile(r"^(<{7}|>{7}) ", re.MULTILINE)
    assert [page.name for page in PAGES if marked.search(page.read_text())] == []


def test_the_readme_is_read_in_minutes() -> None:
    assert len(README.read_text().splitlines()) <= MAX_LINES


def test_the_keys_of_the_readme_are_keys() -> None:
    section = README.read_text().partition("\n## Configuration\n")[2].partition("\n## ")[0]
    keys = KEY_ROW.findall(section)
    assert len(keys) == section.count("\n| `") >= 5
    assert set(keys) <= TPTrainingConfig.model_fields.keys()


@pytest.mark.parametrize(
    ("spelling", "default"),
    [
        *(
            (spelling, as_json(default))
            for name, default, others in fields(TPTrainingConfig)
            for spelling in (name, *others)
        ),
        ("tp_grain_size", "1"),
    ],
)
def test_every_spelling_of_a_key_is_taken_with_its_default(spelling: str, default: str) -> None:
    assert TPTrainingConfig(**{spelling: json.loads(default)}) == TPTrainingConfig()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert list(broken_links(page, page.read_text())) == []


def test_a_broken_link_is_found() -> None:
    text = "[a](docs/README.md#documentation) [b](docs/none.md) [c](docs/README.md#none) [d](#none)"
    assert list(broken_links(README, text)) == ["docs/none.md", "docs/README.md#none", "#none"]


def test_configurations_in_the_pages_are_accepted() -> None:
    blocks = [block for page in PAGES for block in CONFIGURATION.findall(page.read_text())]
    assert blocks
    for block in blocks:
        get_tensor_parallel_config(json.loads(block))


def test_every_page_is_in_the_index() -> None:
    index = DOCS / "README.md"
    linked = {index.parent / link.partition("#")[0] for link in LINK.findall(index.read_text())}
    assert {page for page in DOCS.glob("*.md") if page != index} - linked == set()


def test_the_maps_have_every_folder() -> None:
    text = (DOCS / "internals.md").read_text()
    tree = FENCE.findall((ROOT / "CONTRIBUTING.md").read_text())[0]
    folders = {p.parent.name for p in ROOT.glob("*/*")}
    for parent in ("csrc", "deepspeed_autotp", "tests"):
        there = {p.name for p in (ROOT / parent).iterdir() if p.is_dir() and p.name[0] not in "_."}
        assert set(re.findall(rf"\(\.\./{parent}/(\w+)\)", text)) == there
        assert sorted(there - set(re.findall(r"(\w+)/", tree))) == []
        folders |= there
    assert sorted(set(re.findall(r"(\w+)/", tree)) - folders) == []


def test_the_drawing_of_a_decoder_block_is_what_its_script_makes() -> None:
    assert (DOCS / "images" / "decoder-block.svg").read_text() == drawing()


def test_the_chart_of_a_step_is_what_its_figures_give() -> None:
    images = DOCS / "images"
    record = json.loads((images / "step.json").read_text())
    assert (images / "step.svg").read_text() == chart(record)


def test_the_comparison_in_the_readme_is_that_of_the_chart() -> None:
    record = json.loads((DOCS / "images" / "step.json").read_text())
    rows = {(row["way"], row["sequence"]): row for row in record["rows"]}
    ways = ("deepspeed", "transformers", "parallelize")
    times = [
        f"{rows[way, 256]['over_first']:.2f} / {rows[way, 64]['over_first']:.2f}" for way in ways
    ]
    size = [sum(p["size"] for p in rows[way, 256]["step"].values()) / 2**20 for way in ways]
    text = README.read_text()
    assert f"| relative step time, sequence 256 / 64 | {' | '.join(times)}" in text
    sent = " | ".join(f"{each:.1f}" for each in size)
    assert f"| MiB in collectives of a step, sequence 256 | {sent} |" in text


def test_the_sizes_that_the_page_of_limits_gives_are_the_limits() -> None:
    text = (DOCS / "limits.md").read_text()
    assert "at most 8 dimensions, and a fused weight at most 64 pieces" in text
    for most, more, limit in (([4] * 8, [4] * 9, "8"), ([[1] * 64, -1], [[1] * 65, -1], "64")):
        TPLayerSpec(patterns=["x"], shape=most)
        with pytest.raises(ValueError, match=rf"\b{limit}\b"):
            TPLayerSpec(patterns=["x"], shape=more)


def test_the_environment_variables_are_those_that_are_read() -> None:
    folders = [(ROOT / "csrc", "*.c"), (ROOT / "deepspeed_autotp", "*.py"), (ROOT, "setup.py")]
    texts = [path.read_text() for folder, kind in folders for path in folder.rglob(kind)]
    read = {
        name
        for text in texts
        for name in re.findall(r'(?:getenv\(|environ(?:\.get\(|\[))"(AUTOTP_\w+)"', text)
    }
    described = set(re.findall(r"^\| `(AUTOTP_\w+)", (ROOT / "docs" / "gpu.md").read_text(), re.M))
    assert described == read - {"AUTOTP_WERROR"}  # of those who build it to work on it
