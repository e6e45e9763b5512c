# SPDX-License-Identifier: Apache-2.0
"""Print what an extra of pyproject.toml needs, a line each: python -m tools.extra docs."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main() -> None:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    print("\n".join(tomllib.loads(text)["project"]["optional-dependencies"][sys.argv[1]]))


if __name__ == "__main__":
    main()
