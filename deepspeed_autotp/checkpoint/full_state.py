# SPDX-License-Identifier: Apache-2.0
"""The whole weights and buffers of a model, collected from its shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp import interop
from deepspeed_autotp.distributed.failure_barrier import PeerFailed, lockstep
from deepspeed_autotp.distributed.transport import carrier
from deepspeed_autotp.state.tensor_parallel import TensorParallel, find_part, without_wrappers

__all__ = ["first_rank_state_dict", "full_state_dict"]


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights and buffers of a model, sharded or not, on the host, on every rank.

    Every rank of the run calls it. The tensors are copies, tied names share one; plain
    transformers and torch load the result. ValueError when a parameter was replaced.
    """
    return _full_state(model, frozen=True, everywhere=True)


def first_rank_state_dict(model: nn.Module, *, frozen: bool) -> dict[str, Tensor] | None:
    """As :func:`full_state_dict` on the first rank of all; None on the others, which help.

    They never hold a whole weight that is cut, but for small ones. Those that share no model with
    the first rank only do what ZeRO 3 needs of them. ``frozen`` says whether weights that do not
    train are in it.
    """
    state = _full_state(model, frozen=frozen, everywhere=False)
    return state if dist.get_rank() == 0 else None


@torch.no_grad()
def _full_state(model: nn.Module, *, frozen: bool, everywhere: bool) -> dict[str, Tensor]:
    """The state of ``model``, on the first rank of all or on all of them."""
    state = find_part(model)
    inner = without_wrappers(model)
    with _collector(state, everywhere=everywhere) as collect:
        if state is not None:
            state.check_identity(inner)
        copies: dict[int, Tensor | None] = {}
        result = {}
        for name, tensor in inner.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):  # what a module's get_extra_state gave
                continue
            if isinstance(tensor, nn.Parameter) and not (frozen or tensor.requires_grad):
                continue
            if id(tensor) not in copies:
                # ZeRO 3 makes a weight whole over all data-parallel ranks, wherever it is kept.
                with interop.gathered([tensor]):
                    copies[id(tensor)] = collect(tensor)
            copied = copies[id(tensor)]
            if copied is not None:
                result[name] = copied
    return result


@contextmanager
def _collector(
    state: TensorParallel | None, *, everywhere: bool
) -> Iterator[Callable[[Tensor], Tensor | None]]:
    """What makes a whole copy on the host of a tensor, or None where this rank gets none."""
    is_given = everywhere or dist.get_rank() == 0

    def uncut(tensor: Tensor) -> Tensor | None:
        return tensor.detach().to("cpu", copy=True) if is_given else None

    if state is None:
        yield uncut
        return
    takes_part = everywhere or 0 in state.group.global_ranks
    assert everywhere or not takes_part or state.group.global_ranks[0] == 0, "torch sorts ranks"

    def collect(tensor: Tensor) -> Tensor | None:
        entry = state.entry(tensor)
        if entry is None or not entry.is_sharded:
            return uncut(tensor)
        if not takes_part:
            return None
        return state.gather_to_host(tensor, entry=entry, parts=parts, everywhere=everywhere)

    if not takes_part:
        yield collect
        return
    try:
        with lockstep(state.group), carrier(state.group, state.place) as parts:
            yield collect
    except PeerFailed:
        raise PeerFailed(
            "collecting the weights failed on another rank, whose own error says why"
        ) from None
