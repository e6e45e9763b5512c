# SPDX-License-Identifier: Apache-2.0
"""A vocabulary that is cut over the ranks of a job, and what a step costs."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.step_calls import Recorder
from deepspeed_autotp.distributed.mappings import Parts
from deepspeed_autotp.distributed.process_group import TPGroup


def parts_of(widths: list[int]) -> Parts:
    """One run after the other, of these widths."""
    starts = [sum(widths[:rank]) for rank in range(len(widths))]
    runs = tuple((start, width) for start, width in zip(starts, widths, strict=True))
    return Parts(size=sum(widths), widths=tuple(widths), runs=runs)


def even(size: int) -> list[int]:
    """Widths of ``size`` columns over the ranks of this job; earlier ranks have one more."""
    ranks = dist.get_world_size()
    return [size // ranks + (rank < size % ranks) for rank in range(ranks)]


def world() -> TPGroup:
    handle = dist.group.WORLD
    assert handle is not None
    return TPGroup(handle)


def own(whole: torch.Tensor, parts: Parts, *, leaf: bool = True) -> torch.Tensor:
    """This rank's columns as a tensor of their own, which wants a gradient."""
    start, width = parts.runs[dist.get_rank()]
    return whole.detach().narrow(-1, start, width).clone().requires_grad_(leaf)


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Kind and bytes of every collective within, as a rank gives them; there once it has ended."""
    calls: list[tuple[str, int]] = []
    with Recorder() as recorder:
        yield calls
    calls.extend((call.kind, call.size) for call in recorder.calls)


class Peak(TorchDispatchMode):
    """Bytes of the tensors that are made within it, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.most = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage(t) for t in tree_leaves((args, kwargs)) if _storage(t) is not None}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = _storage(tensor)
            if storage is not None and storage not in known and storage not in self._seen:
                self._seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.most = max(self.most, self.live)
        return result

    def _gone(self, size: int) -> None:
        self.live -= size


def _storage(value: Any) -> Any:
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.device.type == "meta":
        return None
    return value.untyped_storage()
