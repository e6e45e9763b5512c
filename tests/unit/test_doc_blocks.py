# SPDX-License-Identifier: Apache-2.0
"""Fenced blocks of README and docs/ are of a known language, and their commands are right.

Python is run by integration/test_doc_blocks.py and test_readme.py, JSON is read by test_docs.py.
``autotp plan`` and ``explain`` run here; of other commands the arguments are read, since tests of
their own run them.
"""

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspeed_autotp.cli.main import build_parser
from tests.support.autotp_command import command
from tests.support.doc_blocks import PAGES, PLAIN, ROOT, all_blocks, blocks_of

LANGUAGES = {"python", "bash", "json", PLAIN}
# What they trace takes longer; test_plan_command.py has smaller ones.
RUN, LONG = ("plan", "explain"), {"--seq", "--suggest", "--html"}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
VARIABLES = set(re.findall(r"^([A-Z]+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
# The module that docs/custom-models.md speaks of.
MODULE = """
from torch import nn

def build():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module() for _ in range(2)])
    for block in model.blocks:
        block.fc1, block.fc2 = nn.Linear(64, 128), nn.Linear(128, 64)
    return model
"""


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a block, without what is set before it."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


COMMANDS = {
    shlex.join(words): words
    for block in all_blocks()
    if block.language == "bash" and not block.fragment
    for words in commands(block.text)
}


def packages() -> set[str]:
    """The names of the packages that pyproject.toml speaks of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    return {re.split(r"[^\w-]", each)[0] for each in listed}


def problem(words: list[str]) -> str:
    """What is wrong with a command, or ""."""
    match words:
        case ["make", *given]:
            for each in given:
                name, is_set, _ = each.partition("=")
                if name not in (VARIABLES if is_set else TARGETS):
                    return f"make has no {name}"
        case ["pip", "install", *given]:
            names = {re.split("==|>=", each)[0] for each in given if each[0] not in "-."}
            return ", ".join(names - packages())
        case ["python", "-m", module, *_]:
            return "" if importlib.util.find_spec(module) else f"there is no module {module}"
        case ["autotp", *given]:
            build_parser()[0].parse_args(given)
            if given[0] in RUN and LONG.isdisjoint(given):
                status, _, errors = command(*given)
                return errors if status else ""
        case _:
            return "no test knows this command"
    return ""


@pytest.mark.parametrize("shown", COMMANDS)
def test_a_command_of_a_block_is_right(
    shown: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mymodel.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert problem(COMMANDS[shown]) == ""


@pytest.mark.parametrize(
    "text",
    ["make nothing", "make demo NOTHING=1", "pip install nothing", "python -m nothing", "nothing"],
)
def test_a_wrong_command_is_found(text: str) -> None:
    assert problem(text.split()) != ""


def test_every_block_has_a_language() -> None:
    assert sorted({b.place for b in all_blocks() if b.language not in LANGUAGES}) == []


def test_targets_of_make_that_the_pages_speak_of_are_there() -> None:
    said = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text())}
    assert said and said <= TARGETS


def test_a_fragment_says_why_and_holds_for_one_block() -> None:
    page = "# A\n\n<!-- fragment: of two machines -->\n```bash\na\n```\n\n```bash\nb\n```\n"
    first, second = blocks_of(page, "a.md")
    assert (first.fragment, first.place) == ("of two machines", "a.md: A")
    assert (second.fragment, second.place) == ("", "a.md: A 2")
