# SPDX-License-Identifier: Apache-2.0
"""Going on from a checkpoint of another TP size, of other rules or another number of replicas.

Each rank makes its own states out of the files of the run that was saved, and DeepSpeed loads them.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from deepspeed_autotp._core import Plan
from deepspeed_autotp.checkpoint.layout import Layout
from deepspeed_autotp.checkpoint.metadata import (
    Experts,
    Metadata,
    check_metadata,
    read_metadata,
    refuse_other_experts,
    refuse_unknown_layout,
)
from deepspeed_autotp.checkpoint.rank_files import CheckpointFiles, as_saved
from deepspeed_autotp.checkpoint.resharded_states import ReshardedStates
from deepspeed_autotp.checkpoint.saved_checkpoint import Kind, SavedCheckpoint
from deepspeed_autotp.checkpoint.unsharded import is_unsharded, layout_of_files, layout_of_model
from deepspeed_autotp.interop.deepspeed.checkpoints import (
    EngineOptimizer,
    LoadRequest,
    MadeStates,
)


def states_for_sharded(
    request: LoadRequest,
    optimizer: EngineOptimizer,
    plan: Plan,
    *,
    rank: int,
    experts: Experts | None = None,
) -> MadeStates | None:
    """What a rank of a model that ``plan`` shards is to load, or None where its files have it.
    ``experts`` as in the metadata.

    ValueError where the checkpoint cannot be loaded; every rank has to be told.
    """
    folder = request.folder
    metadata = read_metadata(folder, experts=experts)
    files = CheckpointFiles(folder, trusted=True)
    if metadata is None and experts is not None and any(folder.glob("*mp_rank_*")):
        refuse_other_experts(folder, None, experts)
    if metadata is None and is_unsharded(files):
        layout = Layout.of_plan(plan)
        with as_saved(folder):
            full = layout_of_files(files, layout.ties)
        saved = _saved(files, full, None, optimizer)
        return _made(request, saved, layout, optimizer, rank=rank)
    check_metadata(folder, metadata, plan, rank=rank)
    if metadata is None or metadata.layout is None:  # DeepSpeed says what differs
        return None
    if metadata.has_layout_of(plan) and _replicas(folder) in (None, optimizer.replicas):
        _check_own_files(files, request, optimizer, rank=rank)
        return None
    saved = _saved(files, metadata.layout, metadata)
    return _made(request, saved, Layout.of_plan(plan), optimizer, rank=rank)


def states_for_unsharded(
    request: LoadRequest, optimizer: EngineOptimizer, model: nn.Module
) -> MadeStates | None:
    """As :func:`states_for_sharded`, for a model that is not sharded."""
    metadata = read_metadata(request.folder)
    if metadata is None:
        return None
    if metadata.layout is None:
        refuse_unknown_layout(request.folder, metadata, ranks=1)
    assert metadata.layout is not None
    files = CheckpointFiles(request.folder, trusted=True)
    saved = _saved(files, metadata.layout, metadata)
    return _made(request, saved, layout_of_model(model), optimizer, rank=0)


def _saved(
    files: CheckpointFiles,
    layout: Layout,
    metadata: Metadata | None,
    optimizer: EngineOptimizer | None = None,
) -> SavedCheckpoint:
    groups = None if metadata is None else metadata.groups
    if metadata is None and optimizer is not None:
        # DeepSpeed notes no names without ZeRO, and goes by the order, as is done here.
        groups = tuple(tuple(name for name, _ in group) for group in optimizer.groups)
    with as_saved(files.folder):
        return SavedCheckpoint(files, layout, groups=groups)


def _made(
    request: LoadRequest,
    saved: SavedCheckpoint,
    layout: Layout,
    optimizer: EngineOptimizer,
    *,
    rank: int,
) -> MadeStates:
    with as_saved(request.folder):
        return _states(request, saved, layout, optimizer, rank=rank)


def _states(
    request: LoadRequest,
    saved: SavedCheckpoint,
    layout: Layout,
    optimizer: EngineOptimizer,
    *,
    rank: int,
) -> MadeStates:
    where = f"the checkpoint {str(request.folder)!r}"
    _refuse_kinds(where, saved, optimizer, with_states=request.optimizer_states)
    states = ReshardedStates(
        saved, layout, replicas=optimizer.replicas, sub_group_size=optimizer.sub_group_size
    )
    expected = [
        tuple((name, layout.parameters[name].local_shape(rank)) for name in group)
        for group in states.groups
    ]
    if expected != list(optimizer.groups) and request.optimizer_states:
        raise ValueError(
            f"{where} was saved with other parameter groups than the optimizer of this run has, or "
            "with another order of them; make the optimizer as the saved run did, or pass "
            "load_optimizer_states=False"
        )
    with_optimizer = request.optimizer_states and saved.kind.is_partitioned
    return MadeStates(
        str(request.folder / saved.files.model_name(0, 0)),
        states.model(rank, optimizer.replica, with_states=request.optimizer_states),
        states.optimizer(rank, optimizer.replica) if with_optimizer else None,
    )


def _refuse_kinds(
    where: str, saved: SavedCheckpoint, optimizer: EngineOptimizer, *, with_states: bool
) -> None:
    """ValueError where states of one optimizer cannot be those of the other."""
    if optimizer.own_way is not None:
        raise ValueError(
            f"{where} was saved at another size, and {optimizer.own_way} is set, expected states "
            f"on the device of the model, one after the other; load it without "
            f"{optimizer.own_way}, save it again, and go on from there"
        )
    if saved.kind.is_stage3 != (optimizer.kind == "zero3") or (
        with_states and saved.kind.name != optimizer.kind
    ):
        raise ValueError(
            f"{where} has the states of {saved.kind.words}, and this run has "
            f"{Kind(optimizer.kind).words}; load it with the zero_optimization, bf16, fp16 and "
            "data_types sections that it was saved with, at any TP size"
        )
    if saved.kind.is_stage3 and not with_states:
        raise ValueError(
            f"{where} was saved at another size under ZeRO 3, where the weights are with the "
            "states of the optimizer; load it with load_optimizer_states=True and "
            "load_module_only=False"
        )


def _check_own_files(
    files: CheckpointFiles, request: LoadRequest, optimizer: EngineOptimizer, *, rank: int
) -> None:
    """ValueError where DeepSpeed would not find whole files of this rank."""
    kind = Kind(optimizer.kind)
    names = [files.model_name(rank, optimizer.replica)]
    if kind.is_partitioned and request.optimizer_states:
        if not any(request.folder.glob("*_optim_states.pt")):
            raise ValueError(
                f"the checkpoint {str(request.folder)!r} was saved without ZeRO, and this run has "
                f"{kind.words}; load it with the zero_optimization section that it was saved with, "
                "or with load_optimizer_states=False"
            )
        names.append(files.optimizer_name(rank, optimizer.replica))
    files.check_all(names)


def _replicas(folder: Path) -> int | None:
    """Data-parallel ranks that saved the checkpoint, by the names of its files; None where they do
    not say so, as without ZeRO."""
    found = {file.name.split("zero_pp_rank_")[1].split("_")[0]
             for file in folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")}  # fmt: skip
    return len(found) or None
