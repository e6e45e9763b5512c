# SPDX-License-Identifier: Apache-2.0
"""A sharded model into the files that ``save_pretrained`` of the unsharded one writes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deepspeed_autotp.checkpoint.adapters import save_adapters
from deepspeed_autotp.checkpoint.atomic_folder import AtomicFolder
from deepspeed_autotp.checkpoint.expert_weights import refuse_experts
from deepspeed_autotp.checkpoint.pretrained_folder import Index, commit_weights
from deepspeed_autotp.checkpoint.ranks import Ranks, ranks_of_run
from deepspeed_autotp.checkpoint.weight_files import WeightFiles, weight_files
from deepspeed_autotp.checkpoint.weight_writer import WeightWriter
from deepspeed_autotp.distributed.failure_barrier import failure_barrier
from deepspeed_autotp.distributed.hosts import folder_identity
from deepspeed_autotp.distributed.transport import Transport, open_transport
from deepspeed_autotp.interop.deepspeed.parameters import full_shape
from deepspeed_autotp.interop.fully_shard import fully_sharded_modules
from deepspeed_autotp.interop.peft import has_adapters
from deepspeed_autotp.interop.pretrained import (
    kept_names,
    refuse_unsaveable,
    saved_model,
    write_config,
)
from deepspeed_autotp.interop.progress_bars import progress_bar
from deepspeed_autotp.interop.wrappers import without_wrappers
from deepspeed_autotp.state.sharded_model import (
    TensorParallel,
    find_nested_tensor_parallel,
    unwrapped_model,
)

__all__ = ["save_pretrained"]


def save_pretrained(
    engine_or_model: nn.Module,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    parallel: bool = False,
) -> None:
    """Write configuration and weights of a sharded model for ``from_pretrained``.

    Every rank of the run calls it. The files are those that the ``save_pretrained`` of the
    unsharded model would write. TP rank 0 gathers and writes tensor by tensor, or with
    ``parallel`` every rank of one TP group, whose ranks have to be on one machine, writes its own
    shards. A crash leaves what was in the folder before; other files in it stay. Of a model with
    adapters these are written, as PEFT does.

    ValueError on all ranks, or RuntimeError for what no user can correct, with nothing written:
    for a model that is not of transformers, for replaced parameters, where the folder cannot be
    written to or the disk is full, and where some rank does not call it within the timeout of the
    process group.
    """
    folder = Path(path)
    with ranks_of_run("save_pretrained") as ranks:
        if ranks.together(lambda: _checked(engine_or_model, max_shard_size, parallel)):
            save_adapters(unwrapped_model(engine_or_model), folder, ranks)
            return
        saving = ranks.together(lambda: _planned(engine_or_model, max_shard_size))
        with closing(_Staged(folder, ranks, saving)) as staged:
            staged.make()
            staged.write(parallel=parallel)
            staged.commit()


@dataclass(frozen=True, slots=True)
class _Saving:
    """What is saved: ``tensors`` of ``model`` by their names, into ``files``."""

    model: nn.Module
    state: TensorParallel | None
    tensors: Mapping[str, Tensor]
    files: WeightFiles
    index: Index


def _checked(engine_or_model: nn.Module, max_shard_size: int | str, parallel: bool) -> bool:
    """Whether only adapters are saved. ValueError for what is not saved."""
    if not isinstance(engine_or_model, nn.Module):
        raise ValueError(
            f"save_pretrained: engine_or_model: got {type(engine_or_model).__name__}, expected a "
            "torch.nn.Module"
        )
    state = find_nested_tensor_parallel(engine_or_model)
    model = unwrapped_model(engine_or_model)
    only_adapters = has_adapters(model)
    refuse_unsaveable(model, only_adapters=only_adapters)
    if fully_sharded_modules(model):
        raise ValueError(
            "save_pretrained: engine_or_model: got a model with fully_shard, expected parameters "
            "that a rank has; give the state_dict of full_state_dict(model) to the save_pretrained "
            "of an unsharded model, or save with torch.distributed.checkpoint and checkpoint_state"
        )
    refuse_experts("save_pretrained: engine_or_model", state, model)
    if state is not None:
        state.check_identity(model)
    return only_adapters


def _planned(engine_or_model: nn.Module, max_shard_size: int | str) -> _Saving:
    state = find_nested_tensor_parallel(engine_or_model)
    model = unwrapped_model(engine_or_model)
    found = model.state_dict(keep_vars=True)
    named = {without_wrappers(n): each for n, each in found.items() if isinstance(each, Tensor)}
    tensors = {name: named[name] for name in kept_names(model, named)}
    full = {
        name: torch.empty(_checked_shape(name, tensor, state), dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }
    saved = saved_model(model, full, max_shard_size=max_shard_size)
    parameters = {id(p): _checked_shape("", p, state) for p in model.parameters()}
    index = Index(
        total_parameters=sum(map(math.prod, parameters.values())),
        total_size=saved.total_size,
        files=saved.files,
    )
    return _Saving(model, state, tensors, weight_files(saved), index)


def _checked_shape(name: str, tensor: Tensor, state: TensorParallel | None) -> tuple[int, ...]:
    """The shape of the full tensor. ValueError where that of this rank's shard was changed."""
    shape = full_shape(tensor)
    entry = None if state is None else state.entry(tensor)
    if state is None or entry is None or not entry.is_sharded:
        return shape
    if math.prod(shape) != math.prod(entry.local_shape(state.group.rank)):
        raise ValueError(
            f"save_pretrained: {name or entry.name}: got a shard of shape {list(shape)}, expected "
            f"{list(entry.local_shape(state.group.rank))}; its shape was changed after the model "
            "was sharded: leave gather_params first, and write into parameters in place"
        )
    return entry.shape


class _Staged:
    """The files of one save, until they are where a loader finds them."""

    def __init__(self, folder: Path, ranks: Ranks, saving: _Saving) -> None:
        self._folder = folder
        self._ranks = ranks
        self._saving = saving
        self._atomic: AtomicFolder | None = None  # on global rank 0
        self._staging = folder
        self._seen: str | None = None

    def make(self) -> None:
        """Make the files, without their tensors."""
        self._staging, self._seen = self._ranks.on_first(self._made)

    def _made(self) -> tuple[Path, str | None]:
        self._atomic = AtomicFolder(self._folder)
        write_config(self._saving.model, self._atomic.staging)
        self._saving.files.make(self._atomic.staging)
        return self._atomic.staging, folder_identity(self._atomic.staging)

    def write(self, *, parallel: bool) -> None:
        """Write the tensors into them."""
        state = self._saving.state
        in_group = self._ranks.is_first if state is None else 0 in state.group.global_ranks
        writes = in_group if parallel else self._ranks.is_first
        self._ranks.together(lambda: self._check_reachable(writes))
        gathers = state is not None and in_group
        gathers = gathers and (not parallel or bool(self._saving.files.computed))
        self._ranks.together(lambda: self._write(writes=writes, gathers=gathers, parallel=parallel))

    def commit(self) -> None:
        """Bring them to the disk and rename them."""

        def commit() -> None:
            if self._atomic is not None:
                commit_weights(self._atomic, self._saving.index)

        self._ranks.on_first(commit)

    def close(self) -> None:
        """Remove what was not committed."""
        if self._atomic is not None:
            self._atomic.close()

    def _check_reachable(self, writes: bool) -> None:
        """ValueError where this rank is to write files that it does not see.

        On another machine it may see them, but a page of a file that two machines write to would
        have the bytes of one of them only.
        """
        if writes and (self._seen is None or folder_identity(self._staging) != self._seen):
            raise ValueError(
                f"save_pretrained: parallel: got ranks of one TP group on several machines, or "
                f"without the folder {str(self._folder)!r} in common, expected one machine; save "
                "with parallel=False"
            )

    def _write(self, *, writes: bool, gathers: bool, parallel: bool) -> None:
        saving = self._saving
        with ExitStack() as stack:
            transport: Transport | None = None
            if gathers:
                assert saving.state is not None
                group, device = saving.state.group, saving.state.device
                stack.enter_context(failure_barrier(group))
                transport = stack.enter_context(open_transport(group, device))
            files = saving.files.opened(self._staging) if writes else nullcontext()
            writer = WeightWriter(
                saving.state,
                files=stack.enter_context(files),
                transport=transport,
                parallel=parallel,
            )
            total = saving.files.nbytes if self._ranks.is_first else None
            done = stack.enter_context(progress_bar(total, "Saving weights"))
            writer.write(saving.model, saving.tensors, saving.files, done=done)
