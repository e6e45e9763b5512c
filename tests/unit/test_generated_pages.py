# SPDX-License-Identifier: Apache-2.0
"""Pages of docs/ that are made of code and records are what the tools make; so is built HTML."""

import argparse
import inspect
import json
from pathlib import Path

import pytest

import deepspeed_autotp
from benchmarks.sweep import Row, judged_rows
from deepspeed_autotp import TPTrainingConfig
from tools import api_page, check_pages, command_line_page, configuration_page, support_page
from tools.docs_pages import DOCS, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_tool_makes(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), "make docs-pages"


def test_every_key_of_a_section_has_a_meaning() -> None:
    for _, section, _ in configuration_page.SECTIONS:
        keys = [name for name, _, _ in configuration_page.fields(section)]
        words = configuration_page.meanings(section)
        assert [key for key in keys if not words.get(key)] == []
        assert words.keys() == set(keys)


def test_a_meaning_may_take_several_lines() -> None:
    words = configuration_page.meanings(TPTrainingConfig)
    assert words["vocab_parallel_ce_backend"] == 'DeepSpeed\'s key; `"liger"` is refused'
    assert words["dtype"].endswith("has to agree with: a torch dtype or any usual spelling")


def test_a_command_is_shown_with_its_arguments_and_its_example() -> None:
    parser = argparse.ArgumentParser(prog="autotp")
    command = parser.add_subparsers().add_parser("do", help="do it", epilog="example: autotp do x")
    command.add_argument("what", help="a thing")
    command.add_argument("--size", type=int, default=3, help="how much (default %(default)s)")
    command.add_argument("--all", action="store_true", help="a | b")
    ((name, words, found),) = command_line_page.commands(parser)
    assert (name, words, found) == ("do", "do it", command)
    text = command_line_page.section(name, words, found)
    assert "```bash\nautotp do x\n```" in text
    assert "| `what` | required | a thing |" in text
    assert "| `--size` `SIZE` | `3` | how much (default 3) |" in text
    assert "| a \\| b |" in text


def test_every_public_name_is_on_the_page_with_its_docstring() -> None:
    text = api_page.page()
    shown = [name for names in api_page.public_names().values() for name in names]
    assert sorted(shown) == sorted(deepspeed_autotp.__all__)
    for name in shown:
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        first = inspect.cleandoc(getattr(deepspeed_autotp, name).__doc__).splitlines()[0]
        assert first.replace(":func:", "") in section, name
        assert f"\n{name}(" in section or "(configuration.md#" in section or ".COLUMN" in section


def row(model_type: str, outcome: str = "ok", **more: object) -> Row:
    figures = {"share": 0.5, "loss": 1e-7, "update": 2e-6} if outcome == "ok" else {}
    return Row(model_type, outcome, **{"reason": "", **figures, **more})  # type: ignore[arg-type]


def test_the_support_matrix_shows_each_size_and_the_reasons() -> None:
    sweeps = {2: [row("llama"), row("gpt2")], 3: [row("llama", share=0.34)]}
    sweeps[3].append(row("reformer", "refused", reason="it | [x], {y}"))
    kept = support_page.record(sweeps, {"transformers": "5.0", "torch": "2.0"})
    assert json.loads(support_page.as_text(kept)) == kept
    text = support_page.page(kept)
    assert "| model type | TP 2 | TP 3 |" in text
    assert "| llama | 0.50, 1e-07, 2e-06 | 0.34, 1e-07, 2e-06 |" in text
    assert "| reformer | not run | refused |" in text
    assert "| trains as one process does | 2 | 1 |" in text
    assert "| reformer | 3 | it \\| [x], {y} |" in text


def test_the_rows_that_a_sweep_has_written_are_read(tmp_path: Path) -> None:
    file = tmp_path / "tp2.json"
    file.write_text(json.dumps([{"model_type": "llama", "outcome": "ok", "reason": ""}]))
    assert judged_rows(file) == [Row("llama", "ok", "")]


def test_a_page_that_fetches_something_is_found(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    page.write_text('<a href="https://a.b"></a><img src="c.svg"><link href="d.css">')
    (tmp_path / "d.css").write_text("p { background: url(e.png) }")
    assert list(check_pages.problems(tmp_path)) == []
    for text in (
        '<script src="https://a.b/c.js"></script>',
        '<link rel="stylesheet" href="//a.b/c.css">',
        "<style>@import url(https://a.b/c.css);</style>",
        '<p style="background: url(http://a.b/c.png)">',
    ):
        page.write_text(text)
        assert len(list(check_pages.problems(tmp_path))) == 1, text
    page.write_text("")
    (tmp_path / "d.css").write_text("p { background: url('https://a.b/c.png') }")
    assert len(list(check_pages.problems(tmp_path))) == 1


def test_a_folder_without_pages_is_a_problem(tmp_path: Path) -> None:
    assert list(check_pages.problems(tmp_path)) == [f"{tmp_path}: there are no pages"]
