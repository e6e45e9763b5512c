# SPDX-License-Identifier: Apache-2.0
"""The page of ``autotp plan --html``: complete, without network, and safe with hostile names."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from deepspeed_autotp._core import Entry, Kind
from deepspeed_autotp.cli.page.areas import Box, divided, strips_of
from deepspeed_autotp.cli.page.file import writable_file, write_file
from deepspeed_autotp.cli.page.gpus import GPUS
from deepspeed_autotp.cli.page.model_map import Group, groups_of
from deepspeed_autotp.cli.page.page import page_of
from deepspeed_autotp.cli.page.tp_sizes import tp_sizes
from deepspeed_autotp.estimate.changes import Changes
from deepspeed_autotp.estimate.estimator import Estimator, Request
from deepspeed_autotp.estimate.report import Estimate
from deepspeed_autotp.estimate.subject import Subject
from tests.support.autotp_command import command
from tests.support.estimate_request import REQUEST

_SIZES = (
    "hidden_size=64,intermediate_size=96,num_attention_heads=8,num_key_value_heads=2,vocab_size=101"
)
LLAMA = f"llama:num_hidden_layers=3,{_SIZES}"
MIXTRAL = f"mixtral:num_hidden_layers=2,{_SIZES},num_local_experts=4"
HOSTILE = "</script><script>alert(1)</script>"
QUOTED = "\"><img src=//evil/x onerror='alert(2)'>&amp;"


class Hostile(nn.Module):
    """Its names are HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(33, 16)
        self.stack = nn.ModuleList(nn.ModuleDict({QUOTED: nn.Linear(16, 16)}) for _ in range(3))
        self.up_proj = nn.Linear(16, 32)
        self.down_proj = nn.Linear(32, 16)
        self.add_module(HOSTILE, nn.Linear(16, 16))


class Page(HTMLParser):
    """What a browser would read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: dict[str, str] = {}
        self._script: str | None = None
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br", "img"):
            self._open.append(tag)
        if tag == "script":
            self._script = dict(attrs).get("id") or ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        elif self._open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def numbers(self) -> set[float]:
        """Those of <data> elements, and those that the text has."""
        given = {float(found["value"] or "nan") for tag, found in self.tags if tag == "data"}
        return given | {float(found) for found in re.findall(r"\d+(?:\.\d+)?", self.text)}


def made(text: str, tp: int, *, traced: bool = False) -> tuple[str, Estimate]:
    """A page and its estimate; other TP sizes are not traced."""
    subject = Subject(text, {}, Changes("bfloat16"))
    estimator, plain = Estimator(subject), replace(REQUEST, shape=None)
    estimate = estimator.estimate(tp, REQUEST if traced else plain)
    sizes = tp_sizes(estimator, plain, estimate, lambda size: None)
    plan = subject.plan(tp)
    assert plan is not None
    return page_of(estimate, plan, sizes, subject.stacks()), estimate


def numbers_of(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers_of(each)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def test_the_page_has_every_number_and_every_pattern_of_the_json() -> None:
    text, estimate = made(LLAMA, 3, traced=True)
    page = Page(text)
    content = json.loads(page.scripts["estimate"])
    assert content == json.loads(json.dumps(estimate.content()))
    # The form's version and the seconds that the trace took are not about the model.
    del content["version"], content["activations"]["seconds"]
    missing = set(numbers_of(content)) - page.numbers()
    assert missing == set()
    for row in content["parameters"]:
        for word in ("pattern", "kind", "source", "rule"):
            assert row[word] in page.text
    for warning in [*content["warnings"], *content["messages"]]:
        assert warning in page.text
    sizes = json.loads(page.scripts["sizes"])
    assert [size["tp_size"] for size in sizes] == list(range(1, 9))
    for size in sizes:
        wanted = {size["peak"], *size["most"].values(), size["sent"]}
        assert wanted <= page.numbers(), size["tp_size"]
    assert sizes[2]["peak"] == max(rank["peak"] for rank in content["ranks"])


def test_eighty_layers_are_a_small_file() -> None:
    text, _ = made(LLAMA.replace("layers=3", "layers=80"), 8)
    assert len(text) < 150_000
    assert "80 &times; <bdi>LlamaDecoderLayer</bdi>" in text


def test_the_page_asks_nothing_of_a_network_and_runs_its_own_script_only() -> None:
    text, _ = made(MIXTRAL, 2)
    page = Page(text)
    for _, found in page.tags:
        assert not {"src", "srcset", "action", "style", "xlink:href"} & set(found)
        assert not any(name.startswith("on") for name in found)
        assert (found.get("href") or "#").startswith("#")
    (policy,) = [found["content"] or "" for _, found in page.tags if "http-equiv" in found]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy and "url(" not in text and "@import" not in text
    assert not re.search(r"https?://", text)


def test_what_is_for_the_mouse_is_for_the_keyboard_too() -> None:
    page = Page(made(LLAMA, 2)[0])
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids))
    told = [(tag, found) for tag, found in page.tags if "data-tip" in found]
    assert {tag for tag, _ in told} == {"a", "tr"}
    for tag, found in told:
        assert found["aria-describedby"] in ids
        assert found.get("tabindex") == "0" if tag == "tr" else found["href"][1:] in ids  # type: ignore[index]
    named = {"role", "aria-hidden", "aria-label"}
    assert all(named & set(found) for tag, found in page.tags if tag == "svg")
    for _, found in page.tags:
        assert found.get("aria-labelledby") in (None, *ids)


def test_names_of_a_model_are_text() -> None:
    text, _ = made(f"{__name__}:Hostile", 2)
    page = Page(text)
    assert HOSTILE not in text and QUOTED not in text
    assert HOSTILE in page.text and QUOTED in page.text
    assert set(page.scripts) == {"estimate", "sizes", ""}
    assert [tag for tag, _ in page.tags if tag == "img"] == []
    assert HOSTILE in json.dumps(json.loads(page.scripts["estimate"]))


def test_a_size_that_cannot_be_is_said_with_the_reason() -> None:
    subject = Subject(LLAMA, {}, Changes())
    estimator, plain = Estimator(subject), replace(REQUEST, shape=None)
    estimate = estimator.estimate(2, plain)

    class Some(Estimator):
        def estimate(self, ranks: int, request: Request) -> Estimate:
            if ranks == 5:
                raise ValueError("no <five>")
            return super().estimate(ranks, request)

    sizes = tp_sizes(Some(subject), plain, estimate, lambda size: None)
    plan = subject.plan(2)
    assert plan is not None
    page = Page(page_of(estimate, plan, sizes, subject.stacks()))
    assert "cannot be: no <five>" in page.text
    assert json.loads(page.scripts["sizes"])[4] == {"tp_size": 5, "reason": "no <five>"}


def groups(text: str, tp: int) -> tuple[Group, ...]:
    subject = Subject(text, {}, Changes())
    plan = subject.plan(tp)
    assert plan is not None
    return groups_of(plan, subject.stacks())


def test_blocks_of_a_kind_are_one_group_and_all_bytes_are_in_groups() -> None:
    found = groups("t5:d_model=64,d_ff=96,num_layers=3,num_heads=8,d_kv=8,vocab_size=101", 2)
    kinds = [(group.title, group.blocks) for group in found if group.blocks]
    assert kinds == [("T5Block", 1), ("T5Block", 2), ("T5Block", 1), ("T5Block", 2)]
    subject = Subject(LLAMA, {}, Changes())
    estimate = Estimator(subject).estimate(3, replace(REQUEST, shape=None))
    plan = subject.plan(3)
    assert plan is not None
    made_of = groups_of(plan, subject.stacks())
    assert [group.blocks for group in made_of] == [0, 3, 0]
    assert sum(group.bytes for group in made_of) == estimate.bytes
    per_rank = [group.bytes_per_rank for group in made_of]
    assert tuple(map(sum, zip(*per_rank, strict=True))) == estimate.bytes_per_rank


def test_areas_are_proportional_to_bytes() -> None:
    sizes = [5, 0, 80, 3, 12, 40]
    boxes = divided(Box(0.0, 0.0, 70.0, 20.0), sizes)
    areas = [box.width * box.height for box in boxes]
    assert areas == pytest.approx([size * 10.0 for size in sizes])
    for group in groups(LLAMA, 2):
        for picture in (group.wide, group.narrow):
            for cell in picture.cells:
                assert cell.box.x >= 0 and cell.box.x + cell.box.width <= picture.width + 1e-6
                assert cell.box.y >= 0 and cell.box.y + cell.box.height <= picture.height + 1e-6


def entries(text: str, tp: int) -> dict[str, Entry]:
    plan = Subject(text, {}, Changes()).plan(tp)
    assert plan is not None
    return {row.pattern.rpartition("layers.*.")[2]: row.entry for row in plan.table()}


def test_a_weight_is_drawn_as_the_plan_shards_it() -> None:
    box = Box(0.0, 0.0, 100.0, 60.0)
    found = entries(MIXTRAL, 2)
    column = strips_of(found["self_attn.q_proj.weight"], 2, box)
    assert [each.boxes for each in column] == [
        (Box(0.0, 0.0, 50.0, 60.0),),
        (Box(50.0, 0.0, 50.0, 60.0),),
    ]
    row = strips_of(found["self_attn.o_proj.weight"], 2, box)
    assert row[1].boxes == (Box(0.0, 30.0, 100.0, 30.0),)
    # gate|up of each of four experts: two runs in four tiles.
    assert found["mlp.experts.gate_up_proj"].kind is Kind.COLUMN
    assert len(strips_of(found["mlp.experts.gate_up_proj"], 2, box)[0].boxes) == 8
    (full,) = strips_of(found["mlp.gate.weight"], 2, box)
    assert (full.rank, full.boxes) == (None, (box,))


def test_strips_that_cannot_be_seen_are_one_for_each_rank() -> None:
    found = entries(LLAMA, 3)["mlp.up_proj.weight"]
    strips = strips_of(found, 3, Box(0.0, 0.0, 0.9, 1.0))
    assert [len(each.boxes) for each in strips] == [1, 1, 1]
    assert sum(each.boxes[0].width for each in strips) == pytest.approx(0.9)


def test_a_rank_fits_is_tight_or_too_large() -> None:
    gpu = next(gpu for gpu in GPUS if gpu.memory == 80)
    verdicts = [gpu.verdict(int(size * 2**30)) for size in (70, 75, 81)]
    assert verdicts == ["fits", "tight", "short"]
    assert [gpu.memory for gpu in GPUS] == sorted(gpu.memory for gpu in GPUS)


def test_the_command_writes_the_file_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    file.write_text("old")
    status, out, errors = command("plan", LLAMA, "--tp", "2", "--html", str(file), "--json")
    assert status == 0, errors
    page = Page(file.read_text())
    assert json.loads(page.scripts["estimate"]) == json.loads(out)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none/plan.html", "but there is no folder '{folder}/none'; make it first"),
        (".", "which is no file, expected the name of one, such as plan.html"),
        ("/dev/null", "which is no file"),
    ],
)
def test_a_file_that_cannot_be_written_is_said_before_anything_is_computed(
    tmp_path: Path, name: str, words: str
) -> None:
    status, _, errors = command("plan", "no-model", "--tp", "2", "--html", str(tmp_path / name))
    assert status == 2
    assert "--html: got " in errors and words.format(folder=tmp_path) in errors


def test_a_failure_of_the_system_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = writable_file(str(tmp_path / "plan.html"))
    file.write_text("old")

    def full(*names: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ValueError, match="cannot be written .No space left on device.; name"):
        write_file(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_suggestion_has_no_page() -> None:
    _, _, errors = command(
        "plan", LLAMA, "--suggest", "--gpus", "2", "--gpu-memory", "80GiB", "--html", "x.html"
    )
    assert "--html: got it with --suggest" in errors
