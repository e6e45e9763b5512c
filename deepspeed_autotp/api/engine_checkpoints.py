# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's checkpoints of an engine have besides, and their loading at other sizes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from deepspeed_autotp.checkpoint.metadata import write_metadata
from deepspeed_autotp.checkpoint.resume import states_for_sharded, states_for_unsharded
from deepspeed_autotp.distributed.consensus import Agreement, Outcome, world_agreement
from deepspeed_autotp.distributed.owned_groups import OwnedGroups
from deepspeed_autotp.interop.deepspeed.auto_ep import expert_parallel_size
from deepspeed_autotp.interop.deepspeed.checkpoints import (
    LoadRequest,
    MadeStates,
    engine_optimizer,
    replace_recovery_scripts,
    save_every_shard,
    watch_checkpoints,
)
from deepspeed_autotp.interop.transformers import config_texts
from deepspeed_autotp.state.sharded_model import tensor_parallel


def watch_shards(engine: Any, model: nn.Module, *, agreement: Agreement) -> None:
    """Save with the engine of a sharded ``model`` how it is sharded, and load what other sizes have
    saved. ``agreement`` spans all ranks of the run; it serves every checkpoint."""
    state = tensor_parallel(model)
    save_every_shard(engine, tp_size=state.group.size)
    experts = None
    if state.expert_blocks:
        experts = expert_parallel_size(model), dist.get_world_size() // state.group.size

    def saving(folder: Path | None) -> None:
        if folder is not None:
            groups = engine_optimizer(engine).groups
            names = [[name for name, _ in group] for group in groups]
            is_named = all(name for group in names for name in group)
            write_metadata(
                folder,
                state.plan,
                names if is_named else None,
                configs=config_texts(model),
                recipe=state.recipe,
                experts=experts,
            )

    def loading(request: LoadRequest) -> MadeStates | None:
        optimizer = engine_optimizer(engine)
        rank = state.group.rank
        return states_for_sharded(request, optimizer, state.plan, rank=rank, experts=experts)

    watch_checkpoints(
        engine,
        saving=lambda folder: agreement.together(lambda: saving(folder)),
        loading=lambda request: _of_all_ranks(agreement, request, loading),
    )
    replace_recovery_scripts(engine)


def watch_unsharded(engine: Any) -> None:
    """Let an engine of TP size 1 load the shards of a larger one."""

    def states(request: LoadRequest) -> MadeStates | None:
        return states_for_unsharded(request, engine_optimizer(engine), engine.module)

    def loading(request: Callable[[], LoadRequest]) -> MadeStates | None:
        with closing(OwnedGroups()) as owned:
            return _of_all_ranks(world_agreement(owned), request, states)

    watch_checkpoints(engine, saving=lambda folder: None, loading=loading)


def _of_all_ranks(
    agreement: Agreement,
    request: Callable[[], LoadRequest],
    states: Callable[[LoadRequest], MadeStates | None],
) -> MadeStates | None:
    """The ``states`` of one checkpoint. ValueError on all ranks where they find others: DeepSpeed
    goes on with what a rank has where it finds none."""

    def work() -> Outcome[MadeStates | None]:
        asked = request()
        return Outcome(states(asked), told=asked.name)

    made, names = agreement.conclude(work)
    if len(set(names)) > 1:
        found = ", ".join(
            f"rank {rank} {'no checkpoint' if name is None else repr(name)}"
            for rank, name in zip(agreement.ranks, names, strict=True)
        )
        raise ValueError(
            f"load_checkpoint: the ranks find different checkpoints: {found}; expected one on all "
            "ranks: give all of them a folder that their host sees, and the same tag"
        )
    return made
