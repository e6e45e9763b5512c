# SPDX-License-Identifier: Apache-2.0
"""The operators in C, and the CUDA library behind those that run on a GPU.

``_ops`` is loaded at the first use and opens ``libautotp_cuda.so`` at the first use of a GPU. Where
that library is missing or does not run on a device, torch's own operations are used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "Devices",
    "Library",
    "build_info",
    "devices",
    "fake",
    "find_library",
    "loaded",
    "on_gpu",
    "unavailable_reason",
    "when_loaded",
]

_log = logging.getLogger("deepspeed_autotp")

_Function = TypeVar("_Function", bound=Callable[..., object])


@dataclass(frozen=True, slots=True)
class Library:
    """``reason`` says why there is no library to use, and is empty where there is one."""

    reason: str
    path: str
    archs: tuple[int, ...]
    toolkit: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Devices:
    """What the CUDA runtime reports; ``error`` is 0, or the cudaError_t with its message."""

    count: int
    error: int
    message: str


class _Operators:
    """``_ops``, loaded once, and what Python adds to its operators then."""

    def __init__(self) -> None:
        self.are_loaded = False
        self._added: list[Callable[[], object]] = []

    def add(self, register: Callable[[], object]) -> None:
        if self.are_loaded:
            register()
        else:
            self._added.append(register)

    def load(self) -> None:
        spec = find_spec("deepspeed_autotp._ops")
        if spec is None or spec.origin is None:
            raise ImportError(
                "deepspeed_autotp._ops is not built; compile it for the installed torch with "
                "'pip install --no-build-isolation .'"
            )
        torch.ops.load_library(spec.origin)
        self.are_loaded = True
        for register in self._added:
            register()
        self._added.clear()


_OPERATORS = _Operators()


def loaded() -> Any:
    """``torch.ops.deepspeed_autotp``; ImportError where it is not built."""
    if not _OPERATORS.are_loaded:
        _OPERATORS.load()
    return torch.ops.deepspeed_autotp


def when_loaded(register: Callable[[], object]) -> None:
    """Call ``register``, which tells torch more about an operator, once that is loaded."""
    _OPERATORS.add(register)


def fake(name: str) -> Callable[[_Function], _Function]:
    """A decorator: the function gives the operator's result without its values."""

    def add(function: _Function) -> _Function:
        when_loaded(lambda: torch.library.register_fake(f"deepspeed_autotp::{name}", function))
        return function

    return add


def build_info() -> tuple[str, str, str]:
    """The compiler of ``_ops``, its torch headers' version, and the oldest supported torch."""
    compiler, headers, oldest = loaded().build_info()
    return compiler, headers, oldest


def find_library() -> Library:
    """The CUDA library. Opening it needs neither a device nor a driver."""
    reason, path, archs, toolkit = loaded().cuda_library()
    return Library(
        reason=reason,
        path=path,
        archs=tuple(int(arch) for arch in archs.split(",") if arch),
        toolkit=(toolkit // 1000, toolkit % 1000 // 10),
    )


def devices() -> Devices:
    """RuntimeError where there is no library."""
    return Devices(*loaded().cuda_devices())


def unavailable_reason(index: int) -> str:
    """Why the kernels do not run on the CUDA device ``index``; empty where they do."""
    reason: str = loaded().cuda_probe(index)
    return reason


def on_gpu(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on a GPU that the kernels run on."""
    if tensor.device.type != "cuda" or torch.version.cuda is None:
        return False
    return _runs(tensor.get_device())


def _runs(index: int) -> bool:
    """Constant during the process, so a compiled graph may rely on it."""
    # It imports torch's compiler, for which only a process with a GPU has to wait.
    from deepspeed_autotp.native.constant_result import constant_result

    runs: bool = constant_result(_asked, index)
    return runs


def _asked(index: int) -> bool:
    return _is_available(index)


@functools.cache
def _is_available(index: int) -> bool:
    reason = unavailable_reason(index)
    if reason:
        _log.warning(
            "cuda:%d: the CUDA kernels are not available, using torch's own operations, which are "
            "slower: %s",
            index,
            reason,
        )
    return not reason
