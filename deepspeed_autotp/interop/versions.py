# SPDX-License-Identifier: Apache-2.0
"""Names of other projects that may change without notice, and the versions that have them.

A name with an underscore is no promise of the project that has it. Each one used here is looked up
through :func:`required`, so that a version without it is an error that says so.
"""

from __future__ import annotations

from importlib.metadata import version
from types import ModuleType
from typing import Any

# The versions that the test suite runs with.
TESTED = {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}


def tested_and_found(project: str) -> str:
    """The version that this package is tested with, and the one that is installed."""
    return f"tested with {project} {TESTED[project]}, found {version(project)}"


def required(owner: object, name: str, *, project: str, needed_for: str) -> Any:
    """The attribute ``name`` of an object, a class or a module of ``project``.

    RuntimeError where it is missing, with the version that is installed and the tested one.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        where = owner if isinstance(owner, (ModuleType, type)) else type(owner)
        raise RuntimeError(
            f"{where.__name__}.{name} is missing: {tested_and_found(project)}; {needed_for} needs "
            f"it. Install a version of {project} near the tested one"
        ) from None
