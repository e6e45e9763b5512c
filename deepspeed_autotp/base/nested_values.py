# SPDX-License-Identifier: Apache-2.0
"""Dictionaries, lists and tuples, and the values that they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["held_values", "is_container"]


def is_container(value: object) -> bool:
    """Whether ``value`` is a dictionary, a list or a tuple."""
    return isinstance(value, (Mapping, list, tuple))


def held_values(value: object) -> Iterable[object]:
    """The values of a container; none of anything else."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()
