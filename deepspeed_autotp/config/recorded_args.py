# SPDX-License-Identifier: Apache-2.0
"""What tp_model_init recorded, for as long as its model lives."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

from deepspeed_autotp import _core

# The key of a record that was made without a model.
_NO_MODEL = 0


@dataclass(frozen=True, slots=True)
class Recorded:
    """One live record: ``values`` as the core has it, and the process group, if any."""

    values: tuple[int, str, int, int]
    tp_group: Any


class ModelRecords:
    """Live records by model. Conflicts between them are the core's to find."""

    def __init__(self) -> None:
        self._core = _core.Records()
        self._models: dict[int, weakref.ref[nn.Module]] = {}
        self._groups: dict[int, Any] = {}

    def add(
        self,
        model: nn.Module | None,
        *,
        tp_size: int,
        dtype: str,
        tp_group: Any,
        group_size: int,
    ) -> None:
        """Record; ValueError names both values when a live record says otherwise."""
        key = _NO_MODEL if model is None else id(model)
        values = (tp_size, dtype, 0 if tp_group is None else id(tp_group), group_size)
        try:
            self._core.add(key, *values)
        except ValueError:
            self._forget_dead()
            self._core.add(key, *values)
        self._groups[key] = tp_group
        if model is not None:
            self._models[key] = weakref.ref(model, lambda _: self._remove(key))

    def of(self, model: nn.Module) -> Recorded | None:
        """The record of ``model``, of one around or inside it, or the one without a model."""
        for key, reference in list(self._models.items()):
            recorded = reference()
            if recorded is not None and _related(recorded, model):
                return self._recorded(key)
        return self._recorded(_NO_MODEL)

    def latest(self) -> Recorded | None:
        """The record that was made last, of those whose model is in use."""
        self._forget_dead()
        found = self._core.latest()
        return None if found is None else self._recorded(found[0])

    def any_alive(self) -> bool:
        """Whether there is a record whose model is in use."""
        self._forget_dead()
        return len(self._core) > 0

    def clear(self) -> None:
        """Forget all records."""
        self._core.clear()
        self._models.clear()
        self._groups.clear()

    def _forget_dead(self) -> None:
        """A model in a reference cycle, as in an engine, lives on until it is collected."""
        if self._models:
            gc.collect()

    def _recorded(self, key: int) -> Recorded | None:
        values = self._core.find(key)
        return None if values is None else Recorded(values, self._groups.get(key))

    def _remove(self, key: int) -> None:
        self._core.remove(key)
        self._models.pop(key, None)
        self._groups.pop(key, None)


def _related(one: nn.Module, other: nn.Module) -> bool:
    return any(m is other for m in one.modules()) or any(m is one for m in other.modules())


# The one process-wide state of the package: DeepSpeed's calls record here without a handle.
RECORDS = ModelRecords()
