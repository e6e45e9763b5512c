# SPDX-License-Identifier: Apache-2.0
"""What is installed, how it was built, and what would be used on this machine."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

import deepspeed_autotp
from deepspeed_autotp import _core
from deepspeed_autotp.distributed import nccl, shared_memory
from deepspeed_autotp.native import operators

__all__ = ["examine", "examined_table"]

# What works with this package; it imports none of them to ask.
_FRAMEWORKS = ("deepspeed", "transformers", "accelerate", "peft", "trl")
# CUDA's number for a driver that is missing or older than the runtime.
_NO_DRIVER = 35

Row = tuple[str, str]


def examined_table() -> Table:
    """The findings for people: ``rich.print(examined_table())``."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, rows in examine().items():
        table.add_row(f"[bold]{title}[/]", "")
        for name, found in rows:
            table.add_row(f"  {name}", escape(found))
    return table


def examine() -> dict[str, list[Row]]:
    """Findings under their titles. Makes a context on each GPU, to ask whether kernels run."""
    library = operators.find_library()
    return {
        "versions": list(_versions()),
        "build": list(_build(library)),
        "devices": list(_devices(library)),
        "used on this machine": list(_used(library)),
    }


def _versions() -> Iterator[Row]:
    yield "deepspeed-autotp", deepspeed_autotp.__version__
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    toolkit = torch.version.cuda
    yield "torch", f"{torch.__version__}, {f'CUDA {toolkit}' if toolkit else 'built without CUDA'}"
    for name in _FRAMEWORKS:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def _build(library: operators.Library) -> Iterator[Row]:
    core = _core.core_info()
    yield "_core", str(_core.__file__)
    yield "PCRE2", f"{core['pcre2']}, {'with' if core['jit'] else 'without'} JIT"
    compiler, torch_headers, torch_oldest = operators.build_info()
    yield "_ops", f"torch {torch_headers} headers, serves {torch_oldest} and later; {compiler}"
    if library.reason:
        yield "CUDA library", f"none: {library.reason}"
        return
    archs = ", ".join(map(str, library.archs))
    major, minor = library.toolkit
    yield "CUDA library", f"{library.path}, CUDA {major}.{minor}, runtime included"
    yield "architectures", f"{archs}, and intermediate code of {library.archs[-1]} for later ones"


def _devices(library: operators.Library) -> Iterator[Row]:
    if not library.reason:
        found = operators.devices()
        words = f"{found.message} (CUDA error {found.error})"
        if found.error == _NO_DRIVER:
            words = f"no NVIDIA driver, or one older than the library needs: {words}"
        yield "CUDA library sees", words if found.error else f"{found.count} devices"
    if not torch.cuda.is_available():
        yield "torch sees", "no GPU"
        return
    for index in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(index)
        memory = f"{seen.total_memory / 2**30:.1f} GiB"
        yield f"cuda:{index}", f"{seen.name}, architecture {seen.major}{seen.minor}, {memory}"


def _used(library: operators.Library) -> Iterator[Row]:
    threads = torch.get_num_threads()
    yield "shard and gather", f"on the CPU in C, {threads} thread{'s' * (threads > 1)}"
    if not torch.cuda.is_available():
        yield "vocab-parallel cross-entropy", "torch's operations, in chunks, as there is no GPU"
    for index in range(torch.cuda.device_count()):
        obstacle = library.reason or operators.unavailable_reason(index)
        used = f"torch's own operations: {obstacle}" if obstacle else "the CUDA library"
        yield f"both on cuda:{index}", used
    yield "collectives", ", ".join(_collectives()) or "none: torch is built without them"
    yield "NCCL for shards of weights", _nccl()


def _nccl() -> str:
    found = nccl.find()
    if not found.reason:
        return f"{found.version}, {found.path}"
    if not torch.cuda.is_available() and not nccl.is_named():
        return "none, as there is no GPU"
    return f"none: {found.reason}"


def _collectives() -> Iterator[str]:
    if not dist.is_available():
        return
    if dist.is_gloo_available():
        yield f"gloo on the CPU, {shared_memory.describe_use()}"
    if dist.is_nccl_available():
        yield f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))} of torch on GPUs"
