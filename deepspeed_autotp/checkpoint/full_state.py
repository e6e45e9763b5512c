# SPDX-License-Identifier: Apache-2.0
"""The full weights and buffers of a model, gathered from its shards.

What ``save_16bit_model`` and ``Trainer.save_model`` write; interop makes DeepSpeed take it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp.checkpoint.expert_weights import Experts, named_as_before
from deepspeed_autotp.distributed.failure_barrier import PeerFailed, failure_barrier
from deepspeed_autotp.distributed.transport import open_transport
from deepspeed_autotp.interop.deepspeed.parameters import gathered_parameters
from deepspeed_autotp.interop.fully_shard import gathered
from deepspeed_autotp.interop.peft import has_adapters
from deepspeed_autotp.interop.wrappers import without_wrappers
from deepspeed_autotp.state.fully_shard import settle_parameters
from deepspeed_autotp.state.sharded_model import (
    TensorParallel,
    find_nested_tensor_parallel,
    refuse_sharded_4bit,
    sharded_4bit,
    unwrapped_model,
)

__all__ = ["rank0_state_dict", "full_state_dict"]


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The full weights and buffers of a model, sharded or not, on the CPU, on every rank.

    Every rank of the run calls it. The tensors are copies, tied names share one; plain
    transformers and torch load the result. ValueError when a parameter was replaced.
    """
    refuse_sharded_4bit("full_state_dict", unwrapped_model(model).parameters())
    return _full_state(model, frozen=True, everywhere=True)


def rank0_state_dict(
    model: nn.Module, *, frozen: bool, names: Collection[str] | None = None
) -> dict[str, Tensor] | None:
    """As :func:`full_state_dict` on rank 0 of the run; None on the others, which help.

    They never hold the full weight of a shard, but for small ones. Those that are not in the TP
    group of rank 0 only do what ZeRO 3 needs of them. ``frozen`` says whether weights that do not
    train are in it; with ``names`` only these tensors are. Of a model with adapters, the weights in
    4 bits that are sharded are not; of another, ValueError for these.
    """
    inner = unwrapped_model(model)
    if not has_adapters(inner):
        refuse_sharded_4bit("the full weights", inner.parameters())
    state = _full_state(model, frozen=frozen, everywhere=False, names=names)
    return state if _is_rank0() else None


def _is_rank0() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@torch.no_grad()
def _full_state(
    model: nn.Module, *, frozen: bool, everywhere: bool, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """The state of ``model``, on rank 0 of the run or on all ranks."""
    state = find_nested_tensor_parallel(model)
    inner = unwrapped_model(model)
    packed = {id(each) for each in sharded_4bit(inner.parameters())}
    with _gatherer(state, everywhere=everywhere) as gather:
        settle_parameters(inner, state)
        found = named_as_before(state, inner.state_dict(keep_vars=True))
        left_out = [name for name, tensor in found.items() if id(tensor) in packed]
        belonging = tuple(f"{name}." for name in left_out)
        copies: dict[int, Tensor | None] = {}
        result = {}
        for name, tensor in found.items():
            if name in left_out or name.startswith(belonging):
                continue
            if names is not None and name not in names:
                continue
            shown = name if names is not None else without_wrappers(name)
            if isinstance(tensor, Experts):
                if frozen or tensor.trains:
                    full = tensor.full()
                    if everywhere or _is_rank0():
                        result[shown] = full
                continue
            if not isinstance(tensor, Tensor):  # what a module's get_extra_state gave
                continue
            if isinstance(tensor, nn.Parameter) and not (frozen or tensor.requires_grad):
                continue
            if id(tensor) not in copies:
                # ZeRO 3 and fully_shard gather a weight over all data-parallel ranks.
                with gathered_parameters([tensor]):
                    copies[id(tensor)] = gather(tensor, gathered(tensor.detach()))
            copied = copies[id(tensor)]
            if copied is not None:
                result[shown] = copied
    return result


@contextmanager
def _gatherer(
    state: TensorParallel | None, *, everywhere: bool
) -> Iterator[Callable[[Tensor, Tensor], Tensor | None]]:
    """What makes a full copy of a tensor on the CPU, or None where this rank gets none.

    It is given the tensor of the model, and its values as they are on a TP rank.
    """
    is_given = everywhere or _is_rank0()

    def replicated(tensor: Tensor, values: Tensor) -> Tensor | None:
        return values.to("cpu", copy=True) if is_given else None

    if state is None:
        yield replicated
        return
    takes_part = everywhere or 0 in state.group.global_ranks
    assert everywhere or not takes_part or state.group.global_ranks[0] == 0, "torch sorts ranks"

    def gather(tensor: Tensor, values: Tensor) -> Tensor | None:
        entry = state.entry(tensor)
        if entry is None or not entry.is_sharded:
            return replicated(tensor, values)
        if not takes_part:
            return None
        return state.gather_to_cpu(values, entry=entry, transport=transport, all_ranks=everywhere)

    if not takes_part:
        yield gather
        return
    try:
        with failure_barrier(state.group), open_transport(state.group, state.device) as transport:
            yield gather
    except PeerFailed:
        raise PeerFailed(
            "gathering the weights failed on another rank, whose own error says why"
        ) from None
