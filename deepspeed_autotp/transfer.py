# SPDX-License-Identifier: Apache-2.0
"""Parts of a tensor from the first rank of a group to all of them, and back.

No other rank sees more than its own part. The parts may be of unequal sizes, or empty, and lie on
any device; they travel as bytes, in pieces, so that what a backend or a copy to its device takes
does not grow with the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp.group import TPGroup

__all__ = ["gather", "scatter"]

# Bytes that are on their way to or from a rank at once. Over gloo on one host 256 MiB take 0.20 s
# in pieces of 1 MiB, 0.07 s in these, and 0.06 s in pieces of 64 MiB.
_PIECE = 16 << 20


def scatter(parts: Sequence[Tensor] | None, into: Tensor, group: TPGroup) -> None:
    """Put ``parts[rank]`` of the first rank into contiguous ``into`` of every rank.

    The other ranks give None. ``into`` may be the first rank's own part itself. ValueError on
    every rank where a part has another size in bytes than the tensor that it goes into.
    """
    _carrier(group).scatter(parts, into)


def gather(part: Tensor, into: Sequence[Tensor] | None, group: TPGroup) -> None:
    """Put ``part`` of every rank into contiguous ``into[rank]`` of the first; else as ``scatter``.

    The other ranks give None.
    """
    _carrier(group).gather(part, into)


def _carrier(group: TPGroup) -> PointToPoint:
    """What moves the parts between the ranks of ``group``; it is chosen here and nowhere else."""
    return PointToPoint(group)


class PointToPoint:
    """Sends and receives of the group's own backend, of at most ``piece`` bytes each."""

    def __init__(self, group: TPGroup, *, piece: int = _PIECE) -> None:
        self._group = group
        self._piece = piece

    def scatter(self, parts: Sequence[Tensor] | None, into: Tensor) -> None:
        lanes = {0: _bytes(into)}
        if parts is not None:
            lanes = {rank: _bytes(part.contiguous()) for rank, part in enumerate(parts)}
        self._check_role(parts)
        longest = self._agreed_longest(lanes, own=into.nbytes)
        if parts is not None and parts[0] is not into:
            _bytes(into).copy_(lanes[0])
        self._move(lanes, longest, sending=parts is not None)

    def gather(self, part: Tensor, into: Sequence[Tensor] | None) -> None:
        own = _bytes(part.contiguous())
        lanes = {0: own}
        if into is not None:
            lanes = {rank: _bytes(place) for rank, place in enumerate(into)}
        self._check_role(into)
        longest = self._agreed_longest(lanes, own=own.numel())
        if into is not None and into[0] is not part:
            lanes[0].copy_(own)
        self._move(lanes, longest, sending=into is None)

    def _check_role(self, of_first: Sequence[Tensor] | None) -> None:
        """The first rank alone has a tensor for every rank."""
        expected = self._group.size if self._group.rank == 0 else None
        assert expected == (None if of_first is None else len(of_first))

    def _agreed_longest(self, lanes: Mapping[int, Tensor], *, own: int) -> int:
        """Bytes of the longest part, once all ranks are known to expect the same sizes.

        Where the group has not met yet it does so here; a backend that makes its connections at
        the first call wants all ranks in it, and an empty part moves none of them.
        """
        group = self._group
        mine = torch.zeros(group.size + 1, dtype=torch.int64, device=group.device)
        mine[-1] = own
        if group.rank == 0:
            for rank, data in lanes.items():
                mine[rank] = data.numel()
        said = group.all_gather(mine, [mine.shape] * group.size)
        expected = said[0].tolist()[:-1]
        given = [int(row[-1]) for row in said]
        if expected != given:
            raise ValueError(
                f"the first of the ranks {list(group.global_ranks)} has parts of {expected} bytes, "
                f"but the ranks themselves have {given}; each part needs the same size on both"
            )
        return max(given)

    def _move(self, lanes: Mapping[int, Tensor], longest: int, *, sending: bool) -> None:
        """All bytes of every lane but a rank's own, all ranks in the same number of pieces."""
        for begin in range(0, longest, self._piece):
            self._group.step()
            pieces = {
                peer: data[begin : begin + self._piece]
                for peer, data in lanes.items()
                if peer != self._group.rank and begin < data.numel()
            }
            if pieces:
                self._move_pieces(pieces, sending=sending)

    def _move_pieces(self, pieces: Mapping[int, Tensor], *, sending: bool) -> None:
        group = self._group
        calls, arrived = [], []
        for peer, piece in pieces.items():
            held = piece
            if not self._carries(piece):
                held = torch.empty_like(piece, device=group.device)
                if sending:
                    held.copy_(piece)
                else:
                    arrived.append((piece, held))
            calls.append(
                dist.P2POp(
                    dist.isend if sending else dist.irecv,
                    held,
                    peer=group.global_ranks[peer],
                    group=group.handle,
                )
            )
        for work in dist.batch_isend_irecv(calls):
            work.wait()
        for piece, held in arrived:
            piece.copy_(held)

    def _carries(self, piece: Tensor) -> bool:
        """Whether the backend takes ``piece`` where it lies."""
        return piece.device.type == self._group.device.type


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
