# SPDX-License-Identifier: Apache-2.0
"""The page of ``autotp plan --html`` in a browser: ``make page-test``."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.autotp_command import command

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.skipif(
        find_spec("playwright") is None,
        reason="playwright is not installed; make page-test installs it",
    ),
]

MODEL = (
    "mixtral:num_hidden_layers=2,hidden_size=64,intermediate_size=96,num_attention_heads=8,"
    "num_key_value_heads=2,vocab_size=101,num_local_experts=4"
)
OPTIONS = ("--tp", "3", "--dp", "2", "--zero", "1", "--seq", "32", "--bandwidth", "450GB/s")
# What the page says in numbers, and who it has asked for something.
NUMBERS = """() => [...document.querySelectorAll("data")].map((each) => Number(each.value))"""
FOCUSED = """() => {
  const at = document.activeElement.getBoundingClientRect();
  return [document.activeElement.id || document.activeElement.tagName, at.width * at.height];
}"""
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"


@dataclass
class Opened:
    """A page, and what the browser has said and asked for since."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The file, and the JSON of the same command."""
    file = tmp_path_factory.mktemp("page") / "plan.html"
    status, out, errors = command("plan", MODEL, *OPTIONS, "--html", str(file), "--json")
    assert status == 0, errors
    return file, json.loads(out)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # A sandbox needs rights that a container's root does not have.
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    with import_module("playwright.sync_api").sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


def opened(browser: Any, file: Path, *, width: int = 1280, scheme: str = "light") -> Opened:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    found = Opened(context.new_page())
    found.page.on("console", lambda message: found.said.append(message.text))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.on("request", lambda request: found.asked.append(request.url))
    found.page.goto(file.as_uri())
    return found


def numbers_of(value: Any) -> set[float]:
    if isinstance(value, (dict, list)):
        each = value.values() if isinstance(value, dict) else value
        return set().union(*map(numbers_of, each))
    return {value} if isinstance(value, (int, float)) and not isinstance(value, bool) else set()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_opens_without_an_error_or_a_request_and_has_the_numbers_of_the_json(
    browser: Any, written: tuple[Path, Any], width: int, scheme: str
) -> None:
    file, content = written
    found = opened(browser, file, width=width, scheme=scheme)
    assert found.said == []
    assert found.asked == [file.as_uri()]
    assert found.page.evaluate(OVERFLOW) == 0
    embedded = found.page.evaluate("JSON.parse(document.getElementById('estimate').textContent)")
    assert embedded == content
    parts = ("parameters", "ranks", "collectives", "bytes", "bytes_per_rank")
    wanted = numbers_of([content[part] for part in parts])
    assert wanted - set(found.page.evaluate(NUMBERS)) == set()
    back = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(16, 20, 26)") == (scheme == "dark")
    shown = "svg.wide" if width == 1280 else "svg.narrow"
    assert found.page.locator(shown).first.is_visible()


def test_the_keyboard_reaches_everything_and_leaves_again(
    browser: Any, written: tuple[Path, Any]
) -> None:
    found = opened(browser, written[0])
    page = found.page
    count = page.locator("main [tabindex='0'], main summary, svg.wide a").count()
    seen = []
    for _ in range(count + 20):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(FOCUSED))
        if seen[-1][0] == "BODY":
            break
    assert seen[-1][0] == "BODY", "the focus is caught"
    # The link to the content and the ranks, of which one takes the focus, come besides.
    assert len(seen) - 1 == count + 2
    assert all(area > 0 for _, area in seen[:-1])
    assert found.said == []


def test_rule_and_source_show_on_focus_and_on_hover(
    browser: Any, written: tuple[Path, Any]
) -> None:
    page = opened(browser, written[0]).page
    tip, weight = page.locator("#tip"), page.locator("svg.wide a[aria-label*=down_proj]").first
    assert not tip.is_visible()
    for act in (weight.focus, weight.hover):
        act()
        assert tip.is_visible()
        assert "model.layers.*.mlp.experts.down_proj: rowwise" in tip.inner_text()
        assert "tp_plan" in tip.inner_text()
        page.keyboard.press("Escape")
        assert not tip.is_visible()
    weight.focus()
    page.keyboard.press("Enter")
    row = page.evaluate("document.activeElement.id")
    assert row == (weight.get_attribute("href") or "")[1:]
    assert tip.is_visible()


def test_the_map_shows_the_shards_of_the_rank_that_is_chosen(
    browser: Any, written: tuple[Path, Any]
) -> None:
    page = opened(browser, written[0]).page
    shade = "getComputedStyle(document.querySelector('.figures .r1')).fillOpacity"
    before = page.evaluate(shade)
    page.locator("#rank-0").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#rank-1").is_checked()
    assert (float(before), page.evaluate(shade)) == (0.2, "1")
