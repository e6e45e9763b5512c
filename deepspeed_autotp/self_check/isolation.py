# SPDX-License-Identifier: Apache-2.0
"""What a trial run must leave as it was: modes, attributes, buffers and random numbers."""

from __future__ import annotations

import random
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

_CONTAINERS = (dict, OrderedDict, list, set)
_SEED = 20


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without autocast; afterwards model and random numbers are as before.

    The flags are set without calling ``eval``: some modules merge weights there.
    """
    saved = [_Saved(module) for module in model.modules()]
    numbers = random.getstate()
    try:
        with _forked(device), torch.autocast(device.type, enabled=False):
            for module in model.modules():
                module.training = False
            yield
    finally:
        random.setstate(numbers)
        for one in saved:
            one.restore()


def forget(error: BaseException) -> None:
    """Let go of what the frames of a failed run hold: its graph would go on to know parameters in
    the shapes that they were lent in, and refuse their gradients in the next run."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__context__


def same_numbers(device: torch.device) -> None:
    """Let the next random numbers be the same in every run and on every rank."""
    random.seed(_SEED)
    torch.default_generator.manual_seed(_SEED)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(_SEED)


def _forked(device: torch.device) -> AbstractContextManager[None]:
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


class _Saved:
    """One module's attributes, one level into its containers, and the values of its buffers."""

    def __init__(self, module: nn.Module) -> None:
        self._held = vars(module)
        self._attributes = dict(self._held)
        self._contents: list[tuple[Any, Any]] = [
            (value, type(value)(value))
            for value in self._attributes.values()
            if type(value) in _CONTAINERS
        ]
        self._buffers = [
            (buffer, buffer.detach().clone()) for buffer in module.buffers(recurse=False)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        self._held.clear()
        self._held.update(self._attributes)
        for container, content in self._contents:
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)
        for buffer, value in self._buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
