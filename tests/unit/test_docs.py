# SPDX-License-Identifier: Apache-2.0
"""What the README and the pages of docs/ say, where code can contradict it."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic_core import PydanticUndefined

from benchmarks.step_chart import chart
from deepspeed_autotp import (
    AutoTPConfig,
    PartitionType,
    TPConfig,
    TPLayerSpec,
    TPTrainingConfig,
    get_tensor_parallel_config,
)
from tools.draw_decoder_block import drawing

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
MAX_LINES = 180
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CONFIGURATION = re.compile(r"^```json\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KEY_ROW = re.compile(r"^\| (`[^|]+) \| (`[^|]+`|required) \| .+ \|$", re.MULTILINE)
# What the section of a key in the table is made of.
SECTIONS: dict[str, tuple[type[Any], str]] = {
    "tensor_parallel": (TPTrainingConfig, ""),
    "tp": (TPConfig, "tp."),
    "partition_config": (AutoTPConfig, "partition_config."),
    "layer_specs[]": (TPLayerSpec, "layer_specs[]."),
}


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


def fields(model: type[Any]) -> dict[str, object]:
    """The keys of a section with their defaults as the table writes them."""
    if dataclasses.is_dataclass(model):
        found = {}
        for field in dataclasses.fields(model):
            if field.init:
                made = field.default_factory is not dataclasses.MISSING
                found[field.name] = field.default_factory() if made else field.default
        return {name: written(value) for name, value in found.items()}
    pydantic = {
        name: field.get_default(call_default_factory=True)
        for name, field in model.model_fields.items()
    }
    return {name: written(value) for name, value in pydantic.items()}


def written(value: object) -> str:
    if value in (dataclasses.MISSING, PydanticUndefined):
        return "required"
    match value:
        case torch.dtype():
            value = str(value).removeprefix("torch.")
        case PartitionType():
            value = value.value
        case TPConfig():
            value = {}
    return f"`{json.dumps(value)}`"


def key_rows() -> list[tuple[list[str], str]]:
    """(spellings, default) of every row of the table of keys."""
    section = README.read_text().partition("\n## Every configuration key\n")[2]
    table = section.partition("\n## ")[0]
    rows = [(re.findall("`([^`]+)`", keys), default) for keys, default in KEY_ROW.findall(table)]
    assert len(rows) == table.count("\n| ") - 1, "a row that is not key, default, meaning"
    return rows


def test_the_readme_is_read_in_minutes() -> None:
    assert len(README.read_text().splitlines()) <= MAX_LINES


def test_the_table_of_keys_has_every_key_with_its_default_and_no_other() -> None:
    expected = {
        prefix + name: default
        for model, prefix in SECTIONS.values()
        for name, default in fields(model).items()
    }
    assert {spellings[0]: default for spellings, default in key_rows()} == expected


@pytest.mark.parametrize(
    ("spelling", "default"),
    [
        (spelling, default.strip("`"))
        for spellings, default in key_rows()
        for spelling in spellings
        if "." not in spelling
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


def test_the_sizes_that_the_readme_gives_are_the_limits() -> None:
    assert "at most 8 dimensions, and a fused weight at most 64 pieces" in README.read_text()
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
