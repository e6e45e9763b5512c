# SPDX-License-Identifier: Apache-2.0
"""Python objects of all ranks on every rank, in one all-gather where they are small.

``torch.distributed.all_gather_object`` takes two, one of sizes and one of objects, and what an
all-gather takes grows with the ranks.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp.distributed.failure_barrier import CollectiveMismatch

T = TypeVar("T")

_MARK = b"autotp\0\1"  # what is sent begins with it
_SIZE = len(_MARK) + 8  # bytes of that and of an object's length
# Bytes of the first all-gather, of a length and an object. What ranks tell of a model that is
# sharded has some 200 bytes.
_FIRST = 512


def exchange_objects(mine: T, handle: dist.ProcessGroup) -> list[T]:
    """Every rank's ``mine``, in rank order. ``handle`` takes CPU tensors. CollectiveMismatch where
    another rank is in another collective."""
    data = pickle.dumps(mine)
    framed = _MARK + len(data).to_bytes(_SIZE - len(_MARK), "little") + data
    heads = _gathered(framed[:_FIRST], _FIRST, handle)
    others = [rank for rank, head in enumerate(heads) if not head.startswith(_MARK)]
    if others:
        ranks = ", ".join(str(dist.get_global_rank(handle, rank)) for rank in others)
        raise CollectiveMismatch(
            f"collective mismatch: rank {ranks} is in another collective than rank "
            f"{dist.get_rank()}, which exchanges objects; all ranks need to make the same calls"
        )
    sizes = [_SIZE + int.from_bytes(head[len(_MARK) : _SIZE], "little") for head in heads]
    rest = max(sizes) - _FIRST
    tails: Sequence[bytes] = [b""] * len(heads)
    if rest > 0:  # on every rank
        tails = _gathered(framed[_FIRST:], rest, handle)
    return [
        pickle.loads((head + tail)[_SIZE:size])
        for head, tail, size in zip(heads, tails, sizes, strict=True)
    ]


def _gathered(data: bytes, size: int, handle: dist.ProcessGroup) -> list[bytes]:
    """The ``data`` of every rank, padded to ``size``."""
    sent = torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
    received = torch.empty(dist.get_world_size(handle), size, dtype=torch.uint8, device="cpu")
    rows: list[Tensor] = list(received.unbind())
    dist.all_gather(rows, sent, group=handle)
    return [row.numpy().tobytes() for row in rows]
