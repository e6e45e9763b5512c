# SPDX-License-Identifier: Apache-2.0
"""A drawing as SVG text that is readable on a light and on a dark page.

Elements have a class and no colour of their own: PALETTE has both colours of each class. The same
calls give the same text, so a test can compare a committed drawing with what its script makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from xml.sax.saxutils import escape

# Class: property, colour on a light page, colour on a dark page.
PALETTE: Mapping[str, tuple[str, str, str]] = {
    "ink": ("fill", "#1f2328", "#f0f6fc"),
    "soft": ("fill", "#59636e", "#9198a1"),
    "forward": ("fill", "#0969da", "#4493f8"),
    "backward": ("fill", "#bc4c00", "#f0883e"),
    "shard": ("fill", "#2da44e", "#3fb950"),
    "pale": ("fill", "#b6c2cf", "#4a5563"),
    "box": ("stroke", "#818b98", "#656c76"),
    "wire": ("stroke", "#818b98", "#656c76"),
    "on-bar": ("fill", "#ffffff", "#0d1117"),
}
_SHAPES = """\
.box { fill: none; stroke-width: 1.2 }
.wire { fill: none; stroke-width: 1.2 }
.absent { stroke-dasharray: 2 2 }
text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }"""


def number(value: float) -> str:
    """A coordinate with two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


class Drawing:
    """Elements in the order in which they are painted; lengths are in pixels."""

    def __init__(self, width: int, height: int, *, title: str) -> None:
        self._size = (width, height)
        self._title = title
        self._elements: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, name: str, *, radius: float = 0
    ) -> None:
        sides = {"x": x, "y": y, "width": width, "height": height}
        self._add("rect", name, sides | ({"rx": radius} if radius else {}))

    def circle(self, x: float, y: float, radius: float, name: str) -> None:
        self._add("circle", name, {"cx": x, "cy": y, "r": radius})

    def path(self, name: str, *points: tuple[float, float]) -> None:
        """Straight lines from point to point."""
        steps = " L ".join(f"{number(x)} {number(y)}" for x, y in points)
        self._elements.append(f'<path class="{name}" d="M {steps}"/>')

    def text(
        self,
        x: float,
        y: float,
        content: str,
        name: str = "ink",
        *,
        size: float = 12,
        anchor: str = "middle",
        turned: bool = False,
        bold: bool = False,
    ) -> None:
        """``y`` is the base line; ``turned`` is read from the bottom to the top."""
        turn = f' transform="rotate(-90 {number(x)} {number(y)})"' if turned else ""
        weight = ' font-weight="600"' if bold else ""
        self._elements.append(
            f'<text class="{name}" x="{number(x)}" y="{number(y)}" font-size="{number(size)}" '
            f'text-anchor="{anchor}"{weight}{turn}>{escape(content)}</text>'
        )

    def render(self) -> str:
        width, height = self._size
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" role="img">',
                f"<title>{escape(self._title)}</title>",
                f"<style>\n{_SHAPES}\n{_colours(1)}",
                f"@media (prefers-color-scheme: dark) {{\n{_colours(2)}\n}}\n</style>",
                *self._elements,
                "</svg>\n",
            ]
        )

    def _add(self, tag: str, name: str, lengths: Mapping[str, float]) -> None:
        given = " ".join(f'{key}="{number(value)}"' for key, value in lengths.items())
        self._elements.append(f'<{tag} class="{name}" {given}/>')


def _colours(page: int) -> str:
    return "\n".join(f".{name} {{ {row[0]}: {row[page]} }}" for name, row in PALETTE.items())
