# SPDX-License-Identifier: Apache-2.0
"""The configuration that a sharded module sees: its own head counts, all else the model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any


class LocalConfig:
    """Mixed into the class of a configuration.

    The integers in ``local`` read as this rank's and can be assigned. All else is that of ``full``,
    the model's own configuration, also what is assigned later: both have one ``__dict__``. What is
    written from it (``to_dict``, ``save_pretrained``) is thus the full configuration. ``__class__``
    is that of ``full``, so that a configuration that makes another of its kind makes a plain one.
    Copies and pickles keep the integers.
    """

    __slots__ = ()
    full: Any
    local: dict[str, int]

    def __copy__(self) -> Any:
        return _made(copy.copy(self.full), self.local)

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _made, (self.full, self.local)


def with_local_integer(config: Any, key: str, value: int) -> Any:
    """``config`` with this rank's value under ``key``; ``config`` itself does not change."""
    if isinstance(config, LocalConfig):
        return _made(config.full, {**config.local, key: value})
    return _made(config, {key: value})


def _made(full: Any, local: Mapping[str, int]) -> Any:
    own: Any = type(full)  # Any: mypy finds no hash in a class
    made = _class(own, tuple(local))
    config: Any = object.__new__(made)
    made.full.__set__(config, full)
    made.local.__set__(config, dict(local))
    object.__setattr__(config, "__dict__", vars(full))
    return config


@lru_cache(maxsize=32)
def _class(own: type, keys: tuple[str, ...]) -> Any:
    """Of a configuration with these integers. To make one takes a millisecond, which each layer of
    a model would take again."""
    attributes: dict[str, Any] = {key: _integer(key) for key in keys}
    attributes["__class__"] = property(lambda _: own)
    # Slots, as the two have one __dict__.
    attributes["__slots__"] = ("full", "local")
    return type(own.__name__, (LocalConfig, own), attributes)


def _integer(key: str) -> Any:
    def read(config: LocalConfig) -> int:
        return config.local[key]

    def assign(config: LocalConfig, value: int) -> None:
        config.local[key] = value

    return property(read, assign)
