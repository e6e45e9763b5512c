# SPDX-License-Identifier: Apache-2.0
"""Attributes of other packages that ours replace, until they are restored."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_ABSENT = object()


class Replaced:
    """What was replaced, in order."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._originals)

    def put(self, owner: Any, name: str, ours: Any) -> None:
        """Let ``ours`` be the attribute ``name`` of a module or a class."""
        self._originals.append((owner, name, vars(owner).get(name, _ABSENT), ours))
        setattr(owner, name, ours)

    def restore(self) -> None:
        """Put back what was there before; what others have replaced since is theirs."""
        while self._originals:
            owner, name, original, ours = self._originals.pop()
            if vars(owner).get(name) is not ours:
                continue
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def put_method(
    replaced: Replaced,
    owner: Any,
    name: str,
    ours: Callable[..., Any],
    *,
    wrap: Callable[[Any], Any] = lambda function: function,
) -> None:
    """Let the function ``name`` of a module or a class be ``ours``, which is given the original
    before its arguments; once, however often it is asked for. ``wrap`` is staticmethod for one."""
    original = getattr(owner, name)
    if hasattr(original, "autotp_original"):
        return

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    call.autotp_original = original  # type: ignore[attr-defined]
    replaced.put(owner, name, wrap(call))
