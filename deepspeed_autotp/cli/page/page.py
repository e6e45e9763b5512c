# SPDX-License-Identifier: Apache-2.0
"""An estimate as one HTML file, made of the templates beside this module."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console

from deepspeed_autotp._core import Plan
from deepspeed_autotp.cli.page.file import write_file
from deepspeed_autotp.cli.page.gpus import GPUS, ROOMY
from deepspeed_autotp.cli.page.model_map import GLYPH, glyphs_of, groups_of
from deepspeed_autotp.cli.page.tp_sizes import PURPOSES, TpSize, tp_sizes
from deepspeed_autotp.estimate.estimator import Estimator, Request
from deepspeed_autotp.estimate.report import Estimate, RankMemory
from deepspeed_autotp.estimate.subject import Subject
from deepspeed_autotp.interop.model_forms import BETWEEN_OVERRIDES

# Ranks of which the map shows one at a time.
_RANKS_SHOWN = 16
_LEGEND = (
    ("column", "output features, from left to right"),
    ("row", "input features, from top to bottom"),
    ("vocabulary", "rows of an embedding"),
    ("hidden", "columns of an embedding"),
    ("replicated", "on every rank"),
    ("replicated+sum", "on every rank, gradients are summed"),
    ("skip", "a rule leaves it alone: on every rank"),
)


def write_page(
    file: Path, subject: Subject, estimator: Estimator, request: Request, estimate: Estimate
) -> None:
    """Write the page of ``estimate``, which is estimated again at other TP sizes.

    Progress is shown on a terminal. ValueError where the file cannot be written.
    """
    plan = subject.plan(estimate.tp_size)
    assert plan is not None, "a TP size of 1"
    with Console(stderr=True).status("") as status:
        sizes = tp_sizes(
            estimator, request, estimate, lambda size: status.update(f"estimating TP {size}")
        )
    write_file(file, page_of(estimate, plan, sizes, subject.stacks()))


def page_of(
    estimate: Estimate,
    plan: Plan,
    sizes: Sequence[TpSize],
    stacks: Mapping[str, Sequence[str]],
) -> str:
    """The text of the file. ``stacks`` has the kinds of the blocks of each list, by its name."""
    templates = environment()
    style = templates.get_template("page.css.j2").render(ranks=_RANKS_SHOWN)
    script = templates.get_template("page.js").render()
    return templates.get_template("page.html.j2").render(
        estimate=estimate,
        content=estimate.content(),
        sizes=sizes,
        sizes_content=[each.content() for each in sizes],
        asked=next(each for each in sizes if each.tp_size == estimate.tp_size),
        largest_peak=max((each.largest.peak for each in sizes if each.largest), default=1),
        groups=groups_of(plan, stacks),
        glyphs=glyphs_of(plan),
        glyph=GLYPH,
        alike=alike(estimate),
        kinds=kinds_held(estimate.ranks),
        legend=_LEGEND,
        shown=min(plan.ranks, _RANKS_SHOWN),
        gpus=GPUS,
        roomy=ROOMY,
        purposes=tuple(PURPOSES),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def environment() -> Environment:
    """The templates, in which values are text and a name that is not there is an error."""
    made = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        size=size_text,
        percent=percent_text,
        duration=duration_text,
        sent=lambda each: each.count * each.size,
        seconds=lambda each: each.seconds or 0.0,
        name_and_overrides=name_and_overrides,
    )
    return made


def name_and_overrides(model: str) -> tuple[str, list[str]]:
    """``llama:hidden_size=8192,...`` in its parts; what has no overrides is a name."""
    name, _, overrides = model.partition(":")
    return (name, BETWEEN_OVERRIDES.split(overrides)) if "=" in overrides else (model, [])


def alike(estimate: Estimate) -> list[list[RankMemory]]:
    """Ranks that need as much of everything, together."""
    groups: dict[tuple[int, ...], list[RankMemory]] = {}
    for rank in estimate.ranks:
        held = (estimate.bytes_per_rank[rank.rank], rank.elements, rank.trained_elements)
        moments = (*rank.in_step.values(), *rank.in_optimizer.values())
        groups.setdefault((*held, *moments), []).append(rank)
    return list(groups.values())


def kinds_held(ranks: Sequence[RankMemory]) -> list[str]:
    """The kinds of memory of which some rank has any."""
    moments = [m for rank in ranks for m in (rank.in_step, rank.after_backward, rank.in_optimizer)]
    kinds = dict.fromkeys(kind for moment in moments for kind in moment)
    return [kind for kind in kinds if any(moment.get(kind) for moment in moments)]


def size_text(size: float) -> str:
    """Bytes in the largest unit of which there is one."""
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            value = size / 1024**power
            return f"{value:.2f} {name}" if value < 10 else f"{value:.1f} {name}"
    return f"{size:.0f} B"


def percent_text(share: float) -> str:
    """A share of 1; what is little is not said to be nothing."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{share * 100:.1f} %" if share < 0.0995 else f"{share * 100:.0f} %"


def duration_text(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} \N{MICRO SIGN}s"


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline style or script."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
