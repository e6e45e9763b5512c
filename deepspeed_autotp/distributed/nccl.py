# SPDX-License-Identifier: Apache-2.0
"""Bytes sent and received between ranks through NCCL.

Collectives of training stay with the user's process group. This opens the NCCL that torch has
loaded, else that of its wheel, else the machine's; ``AUTOTP_NCCL`` names the file of another, and
is empty to go without. Nothing is opened before it is asked for, and every call has a time limit.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from deepspeed_autotp.distributed.process_group import TPGroup, time_limit
from deepspeed_autotp.native import operators

__all__ = ["Communicator", "Found", "check_environment", "connect", "find"]

_ID_BYTES = 128
_VARIABLE = "AUTOTP_NCCL"

_log = logging.getLogger("deepspeed_autotp")

_ops = operators.loaded()


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


def connect(group: TPGroup, place: torch.device) -> Communicator | None:
    """NCCL between the ranks of ``group`` for tensors on ``place``, which is a rank's own.

    None on all ranks where one of them cannot use it, where versions differ, where two of them
    have the same GPU, or where it fails to start, which is a warning. All ranks call it.
    """
    if group.size == 1 or not _is_wanted(place) or not _agreed(group, place):
        return None
    number, words = _started(group, place)
    everyone = False
    try:
        well = torch.tensor([number is not None], dtype=torch.int64, device=group.device)
        everyone = all(map(bool, group.all_gather(well, [well.shape] * group.size)))
    finally:
        if number is not None and not everyone:
            _ops.nccl_close(number)
    if number is not None and everyone:
        return Communicator(number, place)
    if words:
        _log.warning("torch.distributed moves the weights, since NCCL does not start: %s", words)
    return None


def is_named() -> bool:
    """Whether ``AUTOTP_NCCL`` names a file."""
    return bool(os.environ.get(_VARIABLE))


def check_environment() -> None:
    """ValueError where ``AUTOTP_NCCL`` names a file that is none of NCCL's."""
    if is_named() and (reason := find().reason):
        raise ValueError(f"{_VARIABLE}: {reason}; unset it, or make it empty to go without NCCL")


class Communicator:
    """NCCL between the ranks of a group, for tensors on ``device``.

    RuntimeError where NCCL fails, or where a rank does not come within half of the time limit of
    the group; from then on at once. A rank that fails tells the others in a collective of the
    group, and waits there for them until they have given up as well.
    """

    def __init__(self, number: int, device: torch.device) -> None:
        self.device = device
        self._number = number

    def exchange(
        self, what: str, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]
    ) -> None:
        """Send and receive at once, each to or from the rank that is its key.

        The tensors are contiguous. What a rank sends has as many bytes as the other receives.
        ``what`` is for errors: "scatter".
        """
        try:
            with torch.no_grad():
                _ops.nccl_exchange(
                    self._number,
                    what,
                    list(sent.values()),
                    list(sent),
                    list(received.values()),
                    list(received),
                )
        finally:
            # The operator writes behind autograd's back.
            torch.autograd.graph.increment_version(list(received.values()))

    def close(self) -> None:
        """Release what NCCL holds; later calls fail. All ranks call it."""
        _ops.nccl_close(self._number)


def _is_wanted(place: torch.device) -> bool:
    """Tensors of a host are moved by a stand-in alone."""
    return place.type == "cuda" or is_named()


def _agreed(group: TPGroup, place: torch.device) -> bool:
    """Whether all ranks can use the same NCCL, each on a GPU of its own."""
    found = find()
    reason = found.reason or _obstacle(found, place)
    if time_limit(group.handle) is None:
        reason = reason or "the process group does not say how long a collective may take"
    own = [0, 0] if reason else [found.number, _identity(place, group.rank)]
    mine = torch.tensor(own, device=group.device)
    said = torch.stack(group.all_gather(mine, [mine.shape] * group.size))
    reason = reason or _difference(*said.T.tolist())
    if reason and place.type != "cpu":
        ranks = f"rank {group.rank} of {group.size}"
        _log.info("%s: torch.distributed moves the weights, not NCCL: %s", ranks, reason)
    return not reason


def _obstacle(found: Found, device: torch.device) -> str:
    """Why NCCL cannot move tensors on a device; empty where it can."""
    if device.type == "cuda":
        return operators.obstacle(device.index)
    if found.on_host and device.type == "cpu":
        return ""
    return f"it moves tensors that lie on a GPU; these lie on {device}"


def _identity(device: torch.device, rank: int) -> int:
    """A number that two ranks share where they have the same GPU."""
    if device.type == "cpu":  # of a stand-in
        return rank
    words = str(torch.cuda.get_device_properties(device).uuid).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=7).digest())


def _difference(numbers: Sequence[int], devices: Sequence[int]) -> str:
    """Why the ranks cannot use NCCL together, by the version and the GPU that each has."""
    if 0 in numbers:
        return f"rank {numbers.index(0)} cannot use it"
    if len(set(numbers)) > 1:
        return f"the ranks have different versions of it: {list(numbers)}, by rank"
    if len(set(devices)) < len(devices):
        again = next(rank for rank, one in enumerate(devices) if one in devices[:rank])
        return f"ranks {devices.index(devices[again])} and {again} have the same GPU"
    return ""


def _started(group: TPGroup, place: torch.device) -> tuple[int | None, str]:
    """The number of a communicator; or None, and why there is none as far as this rank knows."""
    made, path, words = torch.zeros(_ID_BYTES, dtype=torch.uint8), _of_wheel(), ""
    if group.rank == 0:
        try:
            _ops.nccl_id_(made, path)
        except RuntimeError as error:
            words = str(error)  # zeros tell the others
    group.step()
    group.broadcast(made)
    if not made.any():
        return None, words
    index, limit = -1 if place.type == "cpu" else place.index, time_limit(group.handle)
    assert limit is not None
    seconds = limit.total_seconds() / 2
    try:
        return _ops.nccl_make(path, made, group.rank, group.size, index, seconds), ""
    except RuntimeError as error:
        return None, str(error)
