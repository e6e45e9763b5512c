# SPDX-License-Identifier: Apache-2.0
"""Parameters of a sharded model as full tensors for a while, on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp.checkpoint.expert_weights import refuse_expert_parameters
from deepspeed_autotp.checkpoint.ranks import Ranks, ranks_of_run
from deepspeed_autotp.config.validation import wrong
from deepspeed_autotp.interop.deepspeed.master_weights import (
    is_gathered,
    refuse_unwritable,
    rewritten_parameters,
)
from deepspeed_autotp.interop.deepspeed.parameters import gathered_parameters, is_partitioned
from deepspeed_autotp.interop.fully_shard import fully_sharded_modules
from deepspeed_autotp.state.fully_shard import is_fully_sharded_parameter
from deepspeed_autotp.state.sharded_model import (
    TensorParallel,
    owner_of,
    refuse_sharded_4bit,
    unwrapped_model,
)

__all__ = ["gather_params"]

_IN_PARTS = (
    "gather_params: got a parameter of a model with fully_shard, which keeps it in parts on "
    "data-parallel ranks, expected one that a rank has; read it with full_state_dict"
)


@contextmanager
def gather_params(
    params_or_module: Tensor | nn.Module | Iterable[Tensor], *, modifier_rank: int | None = None
) -> Iterator[None]:
    """A context in which parameters are full tensors, on every rank.

    params_or_module  a parameter, several, or a module (an engine, too) with all of its parameters
    modifier_rank     the global rank whose changes are kept, as in DeepSpeed's
                      ``GatheredParameters``; None: changes are discarded

    The ranks of a TP group enter together, under ZeRO 3 those of the run, and with
    ``modifier_rank`` the ranks of the run enter and leave together. Then the values of that rank
    are sharded into the memory of the parameters on all ranks, and into the copies in float32 that
    DeepSpeed's optimizers update. An error within is raised after the shards are back as they were;
    with ``modifier_rank`` on all ranks. Change values in place. A forward of the model within is a
    RuntimeError.

    ValueError for parameters whose changes cannot be kept, before anything is gathered.
    """
    held = [_Held(p, owner_of(p)) for p in _parameters(params_or_module)]
    if modifier_rank is None:
        with ExitStack() as stack:
            _enter(
                held, stack, gathered_parameters([h.parameter for h in held if h.is_partitioned])
            )
            yield
        return
    with ranks_of_run("gather_params") as ranks:
        ranks.together(lambda: _check(held, modifier_rank))
        ranks.compare({"modifier_rank": str(modifier_rank)}, "gather_params:")
        with ExitStack() as stack:
            _enter(held, stack, rewritten_parameters([h.parameter for h in held]))
            with _failing_together(held, ranks):
                yield
            _write(held, ranks, modifier_rank)


@dataclass(frozen=True, slots=True)
class _Held:
    """A parameter, and the state of the sharded model that it is of."""

    parameter: Tensor
    state: TensorParallel | None

    @property
    def is_partitioned(self) -> bool:
        """Whether ZeRO 3 has partitioned it, and it is not gathered."""
        return is_partitioned(self.parameter) and not is_gathered(self.parameter)


def _parameters(given: object) -> list[Tensor]:
    """The parameters, each once."""
    parameters: dict[int, Tensor] = {}
    if isinstance(given, nn.Module):
        given = unwrapped_model(given)
        if fully_sharded_modules(given):
            raise ValueError(_IN_PARTS)
        given = given.parameters()
    several = [given] if isinstance(given, Tensor) or not isinstance(given, Iterable) else given
    for each in several:
        if not isinstance(each, Tensor):
            raise ValueError(
                f"gather_params: {wrong(each, 'a parameter, several, or a torch.nn.Module')}"
            )
        if is_fully_sharded_parameter(each):
            raise ValueError(_IN_PARTS)
        parameters[id(each)] = each
    found = list(parameters.values())
    refuse_sharded_4bit("gather_params", found)
    refuse_expert_parameters("gather_params", found)
    return found


def _check(held: Sequence[_Held], modifier_rank: object) -> None:
    world = dist.get_world_size() if dist.is_initialized() else 1
    if type(modifier_rank) is not int or not 0 <= modifier_rank < world:
        expected = f"a global rank, from 0 to {world - 1}, or None"
        raise ValueError(f"gather_params: modifier_rank: {wrong(modifier_rank, expected)}")
    refuse_unwritable(each.parameter for each in held)
    if any(is_partitioned(each.parameter) and is_gathered(each.parameter) for each in held):
        raise ValueError(
            "gather_params: modifier_rank: got parameters that ZeRO 3 has gathered in a context "
            "around this one, which would discard the changes; expected parameters that are "
            "partitioned: give the outer context a modifier_rank instead"
        )

    for each in held:
        if each.state is None and not is_partitioned(each.parameter):
            raise ValueError(
                f"gather_params: modifier_rank: got a parameter of shape "
                f"{list(each.parameter.shape)} that is of no sharded model, expected one that was "
                "sharded, or partitioned by ZeRO 3; change it without gather_params"
            )


def _enter(
    held: Sequence[_Held], stack: ExitStack, partitions: AbstractContextManager[None]
) -> None:
    stack.enter_context(partitions)
    for each in held:
        if each.state is not None:
            entry = each.state.entry(each.parameter)
            assert entry is not None
            with torch.no_grad():
                each.state.hold(each.parameter, entry=entry)
            stack.callback(each.state.release, each.parameter)


@contextmanager
def _failing_together(held: Sequence[_Held], ranks: Ranks) -> Iterator[None]:
    """Let an error within, or a tensor that cannot be written, be an error on all ranks, so that
    none waits for another; on the rank of the error it is that error itself."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error

    def settle() -> None:
        if failed is not None:
            raise failed
        _check_shapes(held)

    try:
        ranks.together(settle)
    except Exception:
        if failed is not None:
            raise failed from None
        raise


def _check_shapes(held: Sequence[_Held]) -> None:
    for each in held:
        entry = None if each.state is None else each.state.entry(each.parameter)
        if entry is not None and tuple(each.parameter.shape) != tuple(entry.shape):
            raise ValueError(
                f"gather_params: {entry.name}: got a tensor of shape "
                f"{list(each.parameter.shape)} at the end, expected {list(entry.shape)}; change "
                "values in place"
            )


@torch.no_grad()
def _write(held: Sequence[_Held], ranks: Ranks, modifier_rank: int) -> None:
    """Let the values of ``modifier_rank`` be those of all ranks, and of what optimizers update."""
    for each in held:
        ranks.broadcast(each.parameter.detach(), source=modifier_rank)
        if each.state is None:
            continue  # ZeRO 3 partitions it
        entry, memory = each.state.entry(each.parameter), each.state.held(each.parameter)
        assert entry is not None
        assert memory is not None
        before = memory.clone()
        each.state.write_held(each.parameter, entry=entry)
        if each.state.masters is not None:
            each.state.masters.update(each.parameter, before=before, after=memory)
