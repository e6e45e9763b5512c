# SPDX-License-Identifier: Apache-2.0
"""Draw docs/images/decoder-block.svg: one decoder block over 2 ranks, and its collectives.

python -m tools.draw_decoder_block
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tools.svg import Drawing

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "images" / "decoder-block.svg"
TITLE = (
    "A decoder block with its weights sharded over 2 ranks: 2 all-reduces in the forward pass, "
    "after the row layers, and 2 in the backward pass, before the column layers"
)

LANES = (104.0, 230.0)  # the middle line of each rank
HALF = 34.0  # half the height of a box
BAR = 24.0  # width of a collective
SIDE = 26.0  # of the square that stands for a weight
PLUS = 8.0  # radius


@dataclass(frozen=True, slots=True)
class Box:
    """A computation of each rank; ``kind`` is that of a layer whose weight is sharded."""

    left: float
    right: float
    label: str
    kind: str = ""


BOXES = (
    Box(94, 144, "norm"),
    Box(190, 270, "q, k, v", "column"),
    Box(284, 360, "attention"),
    Box(374, 436, "o", "row"),
    Box(526, 576, "norm"),
    Box(622, 704, "gate, up", "column"),
    Box(718, 792, "activation"),
    Box(806, 868, "down", "row"),
)
HEADS = ("heads 0, 1", "heads 2, 3")
COLLECTIVES = ((167, "backward"), (460, "forward"), (599, "backward"), (892, "forward"))
# Where a residual leaves, and where it is added.
RESIDUALS = ((84, 496), (515, 928))
END = 964.0


def drawing() -> str:
    d = Drawing(980, 356, title=TITLE)
    d.text(322, 26, "attention", size=14, bold=True)
    d.text(747, 26, "feed-forward network", size=14, bold=True)
    for rank, y in enumerate(LANES):
        d.text(36, y - 6, f"TP rank {rank}", bold=True)
        d.text(36, y + 10, "activations", "soft", size=11)
        _wires(d, y, outer=y - 54 if rank == 0 else y + 54)
        for box in BOXES:
            _box(d, box, y, rank)
    for x, direction in COLLECTIVES:
        _collective(d, x, direction)
    _legend(d)
    return d.render()


def _wires(d: Drawing, y: float, *, outer: float) -> None:
    """From box to box, around them for the residuals, and the additions."""
    stops = sorted(
        [(box.left, box.right) for box in BOXES]
        + [(added - PLUS, added + PLUS) for _, added in RESIDUALS]
    )
    starts = [72.0, *(right for _, right in stops)]
    ends = [*(left for left, _ in stops), END]
    for start, end in zip(starts, ends, strict=True):
        d.path("wire", (start, y), (end, y))
    d.path("wire", (END - 6, y - 4), (END, y), (END - 6, y + 4))
    inner = y - PLUS if outer < y else y + PLUS
    for leaves, added in RESIDUALS:
        d.path("wire", (leaves, y), (leaves, outer), (added, outer), (added, inner))
        d.circle(added, y, PLUS, "box")
        d.path("wire", (added - 4, y), (added + 4, y))
        d.path("wire", (added, y - 4), (added, y + 4))


def _box(d: Drawing, box: Box, y: float, rank: int) -> None:
    d.rect(box.left, y - HALF, box.right - box.left, 2 * HALF, "box", radius=5)
    middle = (box.left + box.right) / 2
    if box.kind:
        d.text(middle, y - 18, box.label, bold=True)
        d.text(middle, y + 28, box.kind, "soft", size=11)
        _shard(d, middle - SIDE / 2, y - 11, box.kind, rank)
    elif box.label == "attention":
        d.text(middle, y - 3, box.label)
        d.text(middle, y + 13, HEADS[rank], "soft", size=11)
    else:
        d.text(middle, y + 4, box.label)


def _shard(d: Drawing, left: float, top: float, kind: str, rank: int) -> None:
    """A weight [out, in] with the shard of this rank filled."""
    d.rect(left, top, SIDE, SIDE, "box absent")
    half = SIDE / 2
    if kind == "column":
        d.rect(left, top + rank * half, SIDE, half, "shard")
    else:
        d.rect(left + rank * half, top, half, SIDE, "shard")


def _collective(d: Drawing, x: float, direction: str) -> None:
    """An all-reduce over both ranks."""
    top, bottom = LANES[0] - HALF - 6, LANES[1] + HALF + 6
    d.rect(x - BAR / 2, top, BAR, bottom - top, direction, radius=5)
    middle = (top + bottom) / 2
    d.text(x + 4.5, middle, f"all-reduce, {direction}", "on-bar", turned=True, bold=True)


def _legend(d: Drawing) -> None:
    for x, y, name, text in (
        (94, 314, "shard", "this rank's shard of a weight [out, in]; norms are replicated"),
        (94, 340, "forward", "forward: the outputs of a row layer are summed"),
        (460, 340, "backward", "backward: the input gradients of column layers are summed, once"),
    ):
        d.rect(x, y - 10, 12, 12, name, radius=2)
        d.text(x + 20, y, text, "soft", anchor="start")


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(drawing())
