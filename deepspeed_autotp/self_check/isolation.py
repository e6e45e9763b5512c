# SPDX-License-Identifier: Apache-2.0
"""What a run of the self-check must leave as it was: modes, attributes, buffers, RNG state."""

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
def isolated(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without autocast; afterwards model and RNG state are as before.

    The flags are set without calling ``eval``: some modules merge weights there.
    """
    saved = [_Saved(module) for module in model.modules()]
    state = random.getstate()
    try:
        with _forked(device), torch.autocast(device.type, enabled=False):
            for module in model.modules():
                module.training = False
            yield
    finally:
        random.setstate(state)
        for one in saved:
            one.restore()


def drop_frames(error: BaseException) -> None:
    """Drop what the frames of a failed run hold: its graph would keep the parameters in the shapes
    of their views, and refuse their gradients in the next run."""
    chained: BaseException | None = error
    while chained is not None:
        traceback.clear_frames(chained.__traceback__)
        chained = chained.__context__


def fix_rng(device: torch.device) -> None:
    """Give every run and every rank the same RNG state."""
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
