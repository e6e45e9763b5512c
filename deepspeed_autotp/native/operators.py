# SPDX-License-Identifier: Apache-2.0
"""The operators in C, and the CUDA library behind those that run on a GPU.

Loads ``_ops``, which opens ``libautotp_cuda.so`` at the first use. Where that library is missing or
does not run on a device, torch's own operations are used.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = [
    "Devices",
    "Library",
    "build_info",
    "devices",
    "find_library",
    "loaded",
    "unavailable_reason",
    "on_gpu",
]

_log = logging.getLogger("deepspeed_autotp")


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


def loaded() -> torch._ops._OpNamespace:
    """``torch.ops.deepspeed_autotp``; ImportError where it is not built."""
    spec = find_spec("deepspeed_autotp._ops")
    if spec is None or spec.origin is None:
        raise ImportError(
            "deepspeed_autotp._ops is not built; compile it for the installed torch with "
            "'pip install --no-build-isolation .'"
        )
    torch.ops.load_library(spec.origin)
    return torch.ops.deepspeed_autotp


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
    runs: bool = _runs(tensor.get_device())
    return runs


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _runs(index: int) -> bool:
    """Constant during the process, so a compiled graph may rely on it."""
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
