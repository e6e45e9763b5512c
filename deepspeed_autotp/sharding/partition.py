# SPDX-License-Identifier: Apache-2.0
"""Parameters replaced by their shards, once nothing can fail any more.

A large tensor is sharded alone and its memory freed before the next one; small tensors on a GPU are
sharded together, since a kernel launch for each takes longer than the copies. Where there is no
memory for a shard beside its tensor, it is packed in the tensor's own. Only this rank's shard goes
from the CPU to a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch
from rich.filesize import decimal
from torch import Tensor, nn

from deepspeed_autotp._core import Entry
from deepspeed_autotp.base.printable import one_line
from deepspeed_autotp.interop.bitsandbytes import is_4bit
from deepspeed_autotp.native import operators, packing
from deepspeed_autotp.sharding.pinned_copy import PinnedCopy
from deepspeed_autotp.sharding.quantized import shard_quantized

__all__ = ["check_memory", "shard_parameters", "move_parameters"]

_log = logging.getLogger("deepspeed_autotp")

# A tensor of at most this many bytes is small: a GPU copies it in less time than a launch takes.
_SMALL = 1 << 20
# What torch's allocator rounds the size of each tensor up to, and what it may lose between them.
_ROUNDED = 512
_MARGIN = 64 << 20
# What a RuntimeError about memory says. torch's stable ABI gives no reason, only the call.
_NO_MEMORY = ("out of memory", "can't allocate memory", "aoti_torch_empty_strided")
# Bytes of small tensors that exist twice for a while.
_TOGETHER = 64 << 20


def check_memory(size: int, tensors: int, device: torch.device) -> None:
    """ValueError where a GPU has no memory for ``size`` bytes in ``tensors``."""
    if device.type != "cuda":
        return
    try:
        torch.empty(size + tensors * _ROUNDED + _MARGIN, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"this rank's shards, {decimal(size)}, do not fit on {device}; use a larger "
            f"TP size or another device: {reason}"
        ) from None


def shard_parameters(parameters: Iterable[tuple[nn.Parameter, Entry]], *, rank: int) -> None:
    """Replace every parameter's data by the shard of its entry on ``rank``."""
    parameters = list(parameters)
    for parameter, entry in parameters:
        if is_4bit(parameter):
            shard_quantized(parameter, entry, rank=rank)
    for several in _batches(each for each in parameters if not is_4bit(each[0])):
        slices = [_shard_slice(entry, rank) for _, entry in several]
        try:
            shards = packing.pack_many([parameter.data for parameter, _ in several], slices)
        except (RuntimeError, MemoryError) as error:
            if not _is_no_memory(error):
                raise
            shards = [
                _in_place(parameter.data, shard_slice, entry, error)
                for (parameter, entry), shard_slice in zip(several, slices, strict=True)
            ]
        for (parameter, _), shard in zip(several, shards, strict=True):
            parameter.data = shard


def move_parameters(
    parameters: Iterable[tuple[nn.Parameter, Entry]], *, rank: int, copy: PinnedCopy
) -> None:
    """As ``shard_parameters``, from the CPU to a device; replicated parameters move, too."""
    for parameter, entry in parameters:
        if entry.is_tied:
            continue
        if is_4bit(parameter):  # which moves with its module
            if entry.is_sharded:
                shard_quantized(parameter, entry, rank=rank)
        elif entry.is_sharded:
            parameter.data = copy.shard(parameter.data, _shard_slice(entry, rank))
        else:
            parameter.data = copy.full(parameter.data)


def _shard_slice(entry: Entry, rank: int) -> packing.ShardSlice:
    return packing.ShardSlice(view=entry.view, runs=entry.runs(rank), shape=entry.local_shape(rank))


def _batches(
    parameters: Iterable[tuple[nn.Parameter, Entry]],
) -> Iterator[list[tuple[nn.Parameter, Entry]]]:
    """Large tensors and those on the CPU one by one, small ones of one GPU together."""
    waiting: list[tuple[nn.Parameter, Entry]] = []
    size = 0
    for parameter, entry in parameters:
        if parameter.nbytes > _SMALL or not operators.on_gpu(parameter):
            yield [(parameter, entry)]
            continue
        waiting.append((parameter, entry))
        size += parameter.nbytes
        if size > _TOGETHER:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def _is_no_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in _NO_MEMORY
    )


def _in_place(
    full: Tensor, shard_slice: packing.ShardSlice, entry: Entry, error: Exception
) -> Tensor:
    _log.warning(
        "%s: no memory for the shard beside the full weight (%s); the shard is packed at the front "
        "of the full weight's memory, which overwrites other tensors that share that memory",
        entry.name,
        one_line(error),
    )
    try:
        return packing.compact_(
            full, view=shard_slice.view, runs=shard_slice.runs, shape=shard_slice.shape
        )
    except ValueError:  # runs in an order, or strides, that would overwrite what is still needed
        shard = packing.pack(
            full.cpu(), view=shard_slice.view, runs=shard_slice.runs, shape=shard_slice.shape
        )
        if full.is_contiguous() or full.untyped_storage().nbytes() == full.nbytes:
            return full.as_strided(shard.shape, shard.stride()).copy_(shard)
        # What is between its elements is not its own.
        return full.narrow(entry.dim, 0, shard.shape[entry.dim]).copy_(shard)
