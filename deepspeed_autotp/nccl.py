# SPDX-License-Identifier: Apache-2.0
"""Packed shards moved between ranks through NCCL: one rank's to all, and all ranks' to one.

Collectives of training stay with the user's process group. This opens the NCCL that torch has
loaded, else that of its wheel, else the machine's; ``AUTOTP_NCCL`` names the file of another, and
is empty to go without. Nothing is opened before it is asked for, and every call has a time limit.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from deepspeed_autotp import native
from deepspeed_autotp.group import TPGroup

__all__ = ["Communicator", "Found", "find"]

# Bytes of a tensor that go at once. The time limit holds for each such piece, and between two of
# them the ranks wait for each other, which takes some 0.1 ms.
_PIECE = 1 << 28
_ID_BYTES = 128
_HOST = torch.device("cpu")

_ops = native.loaded()


@dataclass(frozen=True, slots=True)
class Found:
    """``reason`` says why there is no NCCL to use, and is empty where there is one.

    ``number`` is the version as NCCL counts it, 0 where it is not known. ``on_host`` says that it
    is a stand-in that moves tensors of a host, which NCCL does not.
    """

    reason: str
    path: str
    version: str
    number: int
    on_host: bool


def find() -> Found:
    """The NCCL that is used here. Finding it touches no device and starts nothing."""
    reason, path, number, version, on_host = _ops.nccl_find(_of_wheel())
    return Found(reason=reason, path=path, version=version, number=number, on_host=on_host)


def _of_wheel() -> str:
    """The file that the wheel of NCCL brings along; empty where it is not installed."""
    try:
        spec = find_spec("nvidia.nccl")
    except ModuleNotFoundError:  # nothing of NVIDIA's is installed
        return ""
    folders = spec.submodule_search_locations if spec is not None else None
    return os.path.join(next(iter(folders)), "lib", "libnccl.so.2") if folders else ""


class Communicator:
    """NCCL between the ranks of a group. All of them make every call, with the same ``root``.

    It is made at the first call, for the device of that call's tensors. What a rank sends has as
    many bytes as the other receives. RuntimeError where NCCL cannot be used on some rank, where it
    fails, or where a rank does not come within the time limit of the group; from then on at once.
    """

    def __init__(self, group: TPGroup, *, piece: int = _PIECE) -> None:
        self._group = group
        self._piece = piece
        self._number: int | None = None
        self._device = _HOST
        self._failed = ""
        self._release: weakref.finalize[..., Communicator] | None = None

    def scatter(self, parts: Sequence[Tensor] | None, into: Tensor, *, root: int = 0) -> None:
        """Fill each rank's ``into`` with ``parts[rank]`` of rank ``root``, which alone has parts.

        Tensors are contiguous, of any dtype, and may differ in size from rank to rank.
        """
        self._check_root(root)
        if self._group.rank != root:
            self._exchange("scatter", [], [], [into], [root])
            return
        others = self._others()
        parts = self._own_parts(parts, into, root)
        self._exchange(
            "scatter", [parts[rank] for rank in others], others, [], [], parts[root], into
        )
        _copy(parts[root], into=into)

    def gather(self, part: Tensor, into: Sequence[Tensor] | None, *, root: int = 0) -> None:
        """Fill ``into[rank]`` of rank ``root``, which alone has it, with each rank's ``part``.

        Tensors are as for ``scatter``.
        """
        self._check_root(root)
        if self._group.rank != root:
            self._exchange("gather", [part], [root], [], [])
            return
        others = self._others()
        into = self._own_parts(into, part, root)
        self._exchange("gather", [], [], [into[rank] for rank in others], others, into[root], part)
        _copy(part, into=into[root])

    def close(self) -> None:
        """Release what NCCL holds; later calls fail. All ranks call it, or none."""
        if self._release is not None:
            self._release()
        self._failed = self._failed or "the communicator is closed"

    def _check_root(self, root: int) -> None:
        if not 0 <= root < self._group.size:
            raise ValueError(f"root is {root}; expected a rank of the group, 0 to {self._last}")

    @property
    def _last(self) -> int:
        return self._group.size - 1

    def _others(self) -> list[int]:
        return [rank for rank in range(self._group.size) if rank != self._group.rank]

    def _own_parts(
        self, parts: Sequence[Tensor] | None, own: Tensor, root: int
    ) -> Sequence[Tensor]:
        """What rank ``root`` has for each rank, checked."""
        if parts is None or len(parts) != self._group.size:
            given = "None" if parts is None else f"{len(parts)} tensors"
            raise ValueError(
                f"rank {root} is the root and gave {given}; expected one tensor for each of the "
                f"{self._group.size} ranks"
            )
        if (parts[root].dtype, parts[root].numel()) != (own.dtype, own.numel()):
            raise ValueError(
                f"the root's own part is {parts[root].dtype} of {parts[root].numel()} items on one "
                f"side and {own.dtype} of {own.numel()} on the other; both must be the same"
            )
        return parts

    def _exchange(
        self,
        what: str,
        sent: Sequence[Tensor],
        to: Sequence[int],
        received: Sequence[Tensor],
        origins: Sequence[int],
        *own: Tensor,
    ) -> None:
        """Send and receive; ``own`` is the root's, which is only looked at."""
        tensors = [*sent, *received, *own]
        _check(tensors)
        if self._failed:
            raise RuntimeError(self._failed)
        if self._group.size == 1:
            return
        number = self._opened(tensors[0].device)
        self._group.step()
        try:
            with torch.no_grad():
                _ops.nccl_exchange(
                    number,
                    what,
                    [tensor.detach() for tensor in sent],
                    to,
                    [tensor.detach() for tensor in received],
                    origins,
                    self._piece,
                )
        finally:
            # The operator writes behind autograd's back.
            torch.autograd.graph.increment_version(received)

    def _opened(self, device: torch.device) -> int:
        """The number of the communicator, which is made at the first call."""
        if self._number is None:
            try:
                self._number = self._make(device)
            except RuntimeError as error:
                self._failed = str(error)
                raise
            self._device = device
            self._release = weakref.finalize(self, _ops.nccl_close, self._number)
        if device != self._device:
            raise ValueError(
                f"the tensors lie on {device}, those of the first call on {self._device}; a "
                "communicator is for one device"
            )
        return self._number

    def _make(self, device: torch.device) -> int:
        group, path = self._group, _of_wheel()
        self._agree(device)
        made, words = torch.zeros(_ID_BYTES, dtype=torch.uint8), ""
        if group.rank == 0:
            try:
                _ops.nccl_id_(made, path)
            except RuntimeError as error:
                words = str(error)  # zeros tell the others
        group.step()
        group.broadcast(made)
        if not made.any():
            raise RuntimeError(words or "rank 0 could not make an id for a communicator of NCCL")
        index = -1 if device.type == "cpu" else device.index
        number: int = _ops.nccl_make(path, made, group.rank, group.size, index, _time_limit(group))
        return number

    def _agree(self, device: torch.device) -> None:
        """RuntimeError on all ranks where some rank cannot use NCCL, or has another version."""
        group, found = self._group, find()
        reason = found.reason or _obstacle(found, device)
        own = torch.tensor([0 if reason else found.number], device=group.device)
        numbers = [int(number) for number in group.all_gather(own, [(1,)] * group.size)]
        if reason:
            raise RuntimeError(f"rank {group.rank} of {group.size} cannot use NCCL: {reason}")
        if 0 in numbers:
            raise RuntimeError(f"rank {numbers.index(0)} of {group.size} cannot use NCCL")
        if len(set(numbers)) > 1:
            raise RuntimeError(
                f"the ranks have different versions of NCCL: {numbers}, by rank; install the same "
                "one everywhere, or name one in AUTOTP_NCCL"
            )


def _obstacle(found: Found, device: torch.device) -> str:
    """Why NCCL cannot move tensors on a device; empty where it can."""
    if device.type == "cuda":
        return native.obstacle(device.index)
    if found.on_host and device.type == "cpu":
        return ""
    return f"it moves tensors that lie on a GPU; these lie on {device}"


def _check(tensors: Sequence[Tensor]) -> None:
    """ValueError for tensors whose bytes are not what they say, or that lie apart."""
    for tensor in tensors:
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            raise ValueError("a tensor that is moved has to be contiguous; call contiguous() first")
        if tensor.is_conj() or tensor.is_neg():
            raise ValueError("a tensor that is moved has a lazy sign; call resolve_conj() first")
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise ValueError(f"the tensors lie on {', '.join(devices)}; expected one device")


def _copy(part: Tensor, *, into: Tensor) -> None:
    with torch.no_grad():
        into.view(-1).copy_(part.view(-1))


def _time_limit(group: TPGroup) -> float:
    """Seconds that a collective of the group may take."""
    options = group.handle._get_backend(group.device).options
    seconds: float = options._timeout.total_seconds()
    return seconds
