# SPDX-License-Identifier: Apache-2.0
"""docs/versions.md: the versions that pyproject.toml asks for, wheels, and what is linked in."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deepspeed_autotp.interop.versions import TESTED

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
# Projects whose versions matter to a user, as the table names them; the others follow.
_NAMES = {
    "torch": "PyTorch",
    "deepspeed": "DeepSpeed",
    "transformers": "transformers",
    "accelerate": "Accelerate",
    "peft": "PEFT",
    "trl": "TRL",
    "bitsandbytes": "bitsandbytes",
    "ray": "Ray",
}
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*(.*)")

_BEGINNING = """\
# Versions, wheels and licences

## Versions

"""
_WHEELS = """
Other versions in the range are expected to work: `tools/versions.sh deepspeed==0.19.7` runs the
fast tests with one. Private names of other projects that are used are looked up in one place each,
and a version without one is an error that names it and the tested version. `autotp doctor` says
what is installed.

Versions follow [semantic versioning](https://semver.org): before 1.0 a minor version may change
what is public, which [CHANGELOG](../CHANGELOG.md) says. Public is what [api.md](api.md),
[configuration.md](configuration.md) and [command-line.md](command-line.md) name.

## Wheels

`make wheel` builds one into `dist/`, installs it into a folder of its own and uses it from there.
`pip install --no-build-isolation .` builds with the torch that is installed; a source distribution
(`python -m build --sdist`) has all that this needs.

"""
_PLATFORMS = (
    ("operating system", "Linux, glibc 2.34 or later"),
    ("processor", "x86-64, tested; aarch64 builds from the same sources, and was not run"),
    ("Python", "one wheel for all: the limited interface of Python 3.11"),
    ("PyTorch", "one wheel for all in the range: its stable interface in C"),
    ("CUDA", "in the wheel where `nvcc` is there when it is built ([gpu.md](gpu.md))"),
)
_LICENCES = """
## Licences

The package is under the Apache License 2.0. Python packages that it needs are dependencies, not
copies. What its libraries contain or load besides:

"""
_LINKED = (
    (
        "PCRE2 10",
        "inside of `_core`, where its static library is found; else loaded",
        "BSD-3-Clause WITH PCRE2-exception; its text is in the wheel, "
        "`deepspeed_autotp/licenses/PCRE2`",
    ),
    (
        "CUDA runtime",
        "inside of `libautotp_cuda.so`, where that is built",
        "NVIDIA CUDA Toolkit EULA, which lets its runtime be distributed (attachment A)",
    ),
    ("PyTorch", "loaded by `_ops`", "BSD-3-Clause"),
    ("NCCL", "loaded where a GPU is used", "BSD-3-Clause"),
)


def requirements(project: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """By name the versions and the extra that ask for each, the package itself first."""
    found: dict[str, tuple[str, str]] = {}
    extras = project["optional-dependencies"]
    for extra, lines in (("", project["dependencies"]), *extras.items()):
        for line in lines:
            match = _REQUIREMENT.fullmatch(line)
            assert match is not None, line
            found.setdefault(match[1], (match[2], extra))
    return found


def tested_versions(project: dict[str, Any]) -> dict[str, str]:
    """The pinned versions of the tests, and of what the package looks into."""
    lines = project["optional-dependencies"]["test"]
    return dict(line.split("==") for line in lines if "==" in line) | TESTED


def _versions() -> Iterator[tuple[str, ...]]:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    tested = tested_versions(project)
    yield "Python", project["requires-python"], "3.11", "the package"
    for name, (versions, extra) in requirements(project).items():
        if name not in _NAMES:
            continue
        use = {"": "the package", "test": "the tests"}.get(
            extra, f"`pip install deepspeed-autotp[{extra}]`"
        )
        yield _NAMES[name], versions or "any", tested.get(name, ""), use


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    """The text of docs/versions.md."""
    return (
        _BEGINNING
        + _table(("project", "versions", "tested", "needed for"), _versions())
        + _WHEELS
        + _table(("", ""), _PLATFORMS)
        + _LICENCES
        + _table(("project", "how", "licence"), _LINKED)
    )
