# SPDX-License-Identifier: Apache-2.0
"""The configuration that a sharded module sees: its own head counts, all else the model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any


class LocalConfig:
    """Mixed into the class of a configuration, one class for each object.

    The integers in ``local`` read as this rank's and can be assigned. All else is that of ``full``,
    the model's own configuration, also what is assigned later: both have one ``__dict__``. What is
    written from it (``to_dict``, ``save_pretrained``) is thus the full configuration. ``__class__``
    is that of ``full``, so that a configuration that makes another of its kind makes a plain one.
    Copies and pickles keep the integers.
    """

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
    own, values = type(full), dict(local)
    attributes = {key: _integer(values, key) for key in values}
    attributes["__class__"] = property(lambda _: own)
    made = type(own.__name__, (LocalConfig, own), attributes | {"full": full, "local": values})
    config: Any = object.__new__(made)
    object.__setattr__(config, "__dict__", vars(full))
    return config


def _integer(values: dict[str, int], key: str) -> Any:
    def assign(_: object, value: int) -> None:
        values[key] = value

    return property(lambda _: values[key], assign)
