# SPDX-License-Identifier: Apache-2.0
"""Point-to-point transfers of bytes between ranks through NCCL.

Collectives of training stay with the user's process group. This opens the NCCL that torch has
loaded, else that of its wheel, else the system's; ``AUTOTP_NCCL`` names another file, or is empty
to disable NCCL. Nothing is opened before it is needed, and every call has a timeout.
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

from deepspeed_autotp.distributed.model_groups import group_timeout
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.native import operators

__all__ = ["Communicator", "NcclLibrary", "check_environment", "connect", "find"]

_CPU = torch.device("cpu")
_ID_BYTES = 128
_VARIABLE = "AUTOTP_NCCL"

_log = logging.getLogger("deepspeed_autotp")


@dataclass(frozen=True, slots=True)
class NcclLibrary:
    """``reason`` says why there is no usable NCCL, and is empty where there is one.

    ``version_code`` is what ncclGetVersion gives, 0 where it is not known. ``is_cpu_stand_in``
    marks a library with NCCL's functions that moves CPU tensors, which NCCL does not.
    """

    reason: str
    path: str
    version: str
    version_code: int
    is_cpu_stand_in: bool


def find() -> NcclLibrary:
    """The NCCL of this process. Finding it uses no device and starts nothing."""
    reason, path, code, version, stand_in = operators.loaded().nccl_find(_wheel_path())
    return NcclLibrary(reason, path, version, version_code=code, is_cpu_stand_in=stand_in)


def _wheel_path() -> str:
    """The file of the wheel ``nvidia-nccl``; empty where it is not installed."""
    try:
        spec = find_spec("nvidia.nccl")
    except ModuleNotFoundError:  # no package of the namespace "nvidia"
        return ""
    folders = spec.submodule_search_locations if spec is not None else None
    return os.path.join(next(iter(folders)), "lib", "libnccl.so.2") if folders else ""


def connect(group: TPGroup, device: torch.device) -> Communicator | None:
    """NCCL between the ranks of ``group`` for tensors on ``device``, this rank's own.

    None on all ranks where one of them cannot use it, where versions differ, where two ranks have
    the same GPU, or where it fails to start, which is a warning. All ranks call it.
    """
    if group.size == 1 or not _is_wanted(device) or not _is_usable_by_all(group, device):
        return None
    handle, problem = _create(group, device)
    on_all_ranks = False
    try:
        ok = torch.tensor([handle is not None], dtype=torch.int64, device=_CPU)
        on_all_ranks = all(map(bool, group.all_gather(ok, [ok.shape] * group.size)))
    finally:
        if handle is not None and not on_all_ranks:
            operators.loaded().nccl_close(handle)
    if handle is not None and on_all_ranks:
        return Communicator(handle, device)
    if problem:
        _log.warning(
            "NCCL failed to initialize, using torch.distributed to transfer the weights: %s",
            problem,
        )
    return None


def is_named() -> bool:
    """Whether ``AUTOTP_NCCL`` names a file."""
    return bool(os.environ.get(_VARIABLE))


def check_environment() -> None:
    """ValueError where ``AUTOTP_NCCL`` names a file that is not an NCCL library."""
    if is_named() and (reason := find().reason):
        raise ValueError(f"{_VARIABLE}: {reason}; unset it, or set it to '' to disable NCCL")


class Communicator:
    """NCCL between the ranks of a group, for tensors on ``device``.

    RuntimeError where NCCL fails, or where a rank does not take part within half of the group's
    timeout; every later call fails at once. A rank that fails tells the others in a collective of
    the group, and waits there for them until they have timed out as well.
    """

    def __init__(self, handle: int, device: torch.device) -> None:
        self.device = device
        self._handle = handle

    def exchange(
        self, what: str, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]
    ) -> None:
        """Send and receive at once, each to or from the rank that is its key.

        The tensors are contiguous. What a rank sends has as many bytes as the other receives.
        ``what`` is for errors: "scatter".
        """
        try:
            with torch.no_grad():
                operators.loaded().nccl_exchange(
                    self._handle,
                    what,
                    list(sent.values()),
                    list(sent),
                    list(received.values()),
                    list(received),
                )
        finally:
            # Autograd does not see the writes of the operator.
            torch.autograd.graph.increment_version(list(received.values()))

    def close(self) -> None:
        """Destroy the communicator; later calls fail. All ranks call it."""
        operators.loaded().nccl_close(self._handle)


def _is_wanted(device: torch.device) -> bool:
    """CPU tensors are moved by a stand-in only."""
    return device.type == "cuda" or is_named()


def _is_usable_by_all(group: TPGroup, device: torch.device) -> bool:
    """Whether all ranks can use the same NCCL, each on a GPU of its own."""
    found = find()
    reason = found.reason or _unsupported_device(found, device)
    if group_timeout(group.handle) is None:
        reason = reason or "the backend of the process group has no timeout"
    local = [0, 0] if reason else [found.version_code, _device_id(device, group.rank)]
    sent = torch.tensor(local, device=_CPU)
    gathered = torch.stack(group.all_gather(sent, [sent.shape] * group.size))
    reason = reason or _mismatch(*gathered.T.tolist())
    if reason and device.type != "cpu":
        _log.info(
            "rank %d of %d: not using NCCL to transfer the weights but torch.distributed: %s",
            *(group.rank, group.size, reason),
        )
    return not reason


def _unsupported_device(found: NcclLibrary, device: torch.device) -> str:
    """Why NCCL cannot move tensors on a device; empty where it can."""
    if device.type == "cuda":
        return operators.unavailable_reason(device.index)
    if found.is_cpu_stand_in and device.type == "cpu":
        return ""
    return f"NCCL moves tensors on a GPU; these are on {device}"


def _device_id(device: torch.device, rank: int) -> int:
    """An integer that is equal on two ranks where they have the same GPU."""
    if device.type == "cpu":  # of a stand-in
        return rank
    uuid = str(torch.cuda.get_device_properties(device).uuid).encode()
    return int.from_bytes(hashlib.blake2b(uuid, digest_size=7).digest())


def _mismatch(versions: Sequence[int], devices: Sequence[int]) -> str:
    """Why the ranks cannot use NCCL together, by the version and the GPU of each."""
    if 0 in versions:
        return f"rank {versions.index(0)} cannot use NCCL"
    if len(set(versions)) > 1:
        return f"the ranks have different NCCL versions: {list(versions)}, by rank"
    if len(set(devices)) < len(devices):
        again = next(rank for rank, one in enumerate(devices) if one in devices[:rank])
        return f"ranks {devices.index(devices[again])} and {again} have the same GPU"
    return ""


def _create(group: TPGroup, device: torch.device) -> tuple[int | None, str]:
    """The handle of a communicator; or None and the error, where this rank knows it."""
    unique_id, path, problem = (
        torch.zeros(_ID_BYTES, dtype=torch.uint8, device=_CPU),
        _wheel_path(),
        "",
    )
    if group.rank == 0:
        try:
            operators.loaded().nccl_id_(unique_id, path)
        except RuntimeError as error:
            problem = str(error)  # the others see zeros
    group.announce()
    group.broadcast(unique_id)
    if not unique_id.any():
        return None, problem
    index, timeout = -1 if device.type == "cpu" else device.index, group_timeout(group.handle)
    assert timeout is not None
    seconds = timeout.total_seconds() / 2
    try:
        return operators.loaded().nccl_make(
            path, unique_id, group.rank, group.size, index, seconds
        ), ""
    except RuntimeError as error:
        return None, str(error)
