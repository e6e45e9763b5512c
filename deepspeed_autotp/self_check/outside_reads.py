# SPDX-License-Identifier: Apache-2.0
"""Weights that the model uses outside of the modules that own them, as a tied embedding whose
weight is multiplied by in place of an output head. Such a use needs all of a weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deepspeed_autotp.base.nested_values import held_values
from deepspeed_autotp.self_check.trace import Run


class OutsideReads(TorchFunctionMode):
    """Within it ``run.outside_reads`` gets the modules of which a parameter is used while they do
    not run, each with the module that runs then, innermost."""

    def __init__(self, modules: Mapping[str, nn.Module], run: Run) -> None:
        super().__init__()
        self._run = run
        self._owners: dict[int, list[str]] = {}
        for name, module in modules.items():
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), []).append(name)

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # A shape or a data type is none of the values.
        if isinstance(result, Tensor) and not self._run.in_backward:
            for each in _parameters((*args, *(kwargs or {}).values())):
                self._note(self._owners.get(id(each), ()))
        return result

    def _note(self, owners: Sequence[str]) -> None:
        running = self._run.running
        if not set(owners).intersection(running):
            for owner in owners:
                self._run.outside_reads.setdefault(owner, running[-1] if running else "")


def _parameters(values: Iterable[object]) -> Iterator[nn.Parameter]:
    for value in values:
        if isinstance(value, nn.Parameter):
            yield value
        else:
            yield from _parameters(held_values(value))
