# SPDX-License-Identifier: Apache-2.0
"""What a run of the self-check must leave as it was: modes, attributes, tensors, RNG state."""

from __future__ import annotations

import hashlib
import random
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepspeed_autotp.interop.rng_states import rng_kept

_CONTAINERS = (dict, OrderedDict, list, set)
_SEED = 20
# A probability at which nothing is ever dropped, and which is still one of dropout.
_NEVER = 1e-30


@contextmanager
def isolated(model: nn.Module, device: torch.device, *, training: bool = True) -> Iterator[None]:
    """Training mode without autocast; afterwards model and RNG state are as before.

    The flags are set without calling ``train``: some modules merge weights there. Probabilities of
    dropout that modules keep, for kernels of their own or for skipping layers, are next to 0.
    """
    saved = [_Saved(module) for module in model.modules()]
    try:
        with rng_kept(device), torch.autocast(device.type, enabled=False):
            for module in model.modules():
                module.training = training
                attributes = vars(module)
                for key, value in attributes.items():
                    if type(value) is float and value > 0 and "drop" in key:
                        attributes[key] = _NEVER
            yield
    finally:
        for one in saved:
            one.restore()


@contextmanager
def seeded() -> Iterator[None]:
    """The RNG state of :func:`fix_rng` on the CPU; afterwards it is as before."""
    cpu = torch.device("cpu")
    with rng_kept(cpu):
        fix_rng(cpu)
        yield


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
    np.random.seed(_SEED)
    torch.default_generator.manual_seed(_SEED)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(_SEED)


def kept_numbers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what modules keep as buffers, or as single numbers in attributes, that is floating
    and finite. Other tensors in attributes are mostly activations."""
    kept: dict[str, Tensor | float] = dict(model.named_buffers())
    for name, module in model.named_modules():
        for key, value in _attributes(module):
            if not isinstance(value, Tensor) or value.numel() == 1:
                kept[f"{name}.{key}" if name else key] = value
    numbers = ((name, torch.as_tensor(value).detach()) for name, value in kept.items())
    return {
        name: number.clone()
        for name, number in numbers
        if number.is_floating_point() and bool(number.isfinite().all())
    }


def rng_digest(device: torch.device) -> int:
    """Equal for equal RNG states of ``device``."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return int.from_bytes(hashlib.blake2b(state.numpy().tobytes(), digest_size=7).digest())


class _Saved:
    """One module's attributes, one level into its containers, and the values of its tensors."""

    def __init__(self, module: nn.Module) -> None:
        self._held = vars(module)
        self._attributes = dict(self._held)
        self._contents: list[tuple[Any, Any]] = [
            (value, type(value)(value))
            for value in self._attributes.values()
            if type(value) in _CONTAINERS
        ]
        kept = (value for _, value in _attributes(module) if isinstance(value, Tensor))
        self._tensors = [
            (tensor, tensor.detach().clone()) for tensor in (*module.buffers(recurse=False), *kept)
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
        for tensor, value in self._tensors:
            if not torch.equal(tensor, value):
                tensor.copy_(value)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Tensor | float]]:
    """Numbers that are neither parameters nor buffers."""
    for key, value in vars(module).items():
        if type(value) in (float, Tensor):
            yield key, value
