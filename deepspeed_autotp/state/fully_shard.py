# SPDX-License-Identifier: Apache-2.0
"""torch's ``fully_shard`` (FSDP2) around a sharded model, over the data-parallel mesh.

It takes a rank's shards for the parameters: between steps a rank has some rows of its shard, a
DTensor, and while a module runs there is a plain parameter with all of them. DTensors and plain
parameters both take the place of what was sharded; the DTensors are known by their names.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp.interop.fully_shard import (
    fully_sharded_modules,
    is_distributed,
    is_fully_sharded,
    mesh_ranks,
    reshard,
)
from deepspeed_autotp.interop.wrappers import all_named_parameters
from deepspeed_autotp.state.grad_sync import grad_hooks
from deepspeed_autotp.state.sharded_model import TensorParallel, container_of, owner_of


class CheckFullyShard:
    """A forward pre-hook of the sharded model: ValueError where fully_shard around it, or around a
    module of it, does not fit."""

    def __init__(self, state: TensorParallel) -> None:
        self._weak = weakref.ref(state)  # which has this: no cycle keeps the shards
        self._seen: set[int] = set()  # modules of fully_shard
        self._calls = 0

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """fully_shard's own hook has run before this one."""
        if not torch.compiler.is_compiling():
            self._look_into(module)
        elif is_fully_sharded(module):  # whose own hook breaks the graph, too
            # Its module imports torch's compiler, which takes long.
            from deepspeed_autotp.native.eager_call import eager_call

            eager_call(self._look_into, module)

    def _look_into(self, module: nn.Module) -> None:
        self._calls += 1
        is_new = is_fully_sharded(module) and id(module) not in self._seen
        if not is_new and self._calls.bit_count() > 1:  # modules alone: now and then
            return
        state = self._state
        root = state.root_in(module)
        for _, each in fully_sharded_modules(root):
            if not self._seen:
                _check_parameters(root, state)
            if id(each) not in self._seen:
                check_mesh(each, state)
                self._seen.add(id(each))

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckFullyShard:
        """Of a copy of the model, which fully_shard has yet to be called for."""
        return CheckFullyShard(copy.deepcopy(self._state, memo))

    @property
    def _state(self) -> TensorParallel:
        state = self._weak()
        assert state is not None, "the model that is called has it"
        return state


def follow_fully_shard(model: nn.Module, state: TensorParallel) -> None:
    """Let ``state`` know the DTensors that fully_shard has put in the place of parameters."""
    root = state.root_in(model)
    modules = {each for top in (model, root) for _, each in fully_sharded_modules(top)}
    if not modules:
        return
    for module in modules:
        check_mesh(module, state)
    reshard(model)
    reshard(root)
    named = dict(all_named_parameters(root))
    parameters = []
    for entry, known in zip(state.plan.entries, state.parameters, strict=True):
        found = named.get(entry.name, known)
        parameters.append(found if is_distributed(found) else known)
    state.set_plan(state.plan, tuple(parameters))


def settle_parameters(model: nn.Module, state: TensorParallel | None) -> None:
    """Let the parameters of ``model`` be what they are between steps, and ``state`` know them.

    ValueError where one is not what was sharded.
    """
    reshard(model)
    if state is not None:
        follow_fully_shard(model, state)
        state.check_identity(model)


def is_fully_sharded_parameter(parameter: Tensor) -> bool:
    """Whether fully_shard keeps ``parameter``, of a sharded model, in parts, also where all of it
    is there for a while."""
    if is_distributed(parameter):
        return True
    state = None if owner_of(parameter) is not None else container_of([parameter])
    root = None if state is None else state.root
    return root is not None and bool(fully_sharded_modules(root))


def check_mesh(module: nn.Module, state: TensorParallel) -> None:
    """ValueError for a mesh with several ranks of the TP group, whose shards it would mix."""
    shared = mesh_ranks(module).intersection(state.group.global_ranks)
    if len(shared) > 1:
        raise ValueError(
            f"fully_shard: mesh: got one with the ranks {sorted(shared)}, which have different "
            "shards in one TP group, expected a mesh of data-parallel ranks; make one mesh, "
            'init_device_mesh(device, (dp, tp), mesh_dim_names=("dp", "tp")), and pass mesh["tp"] '
            'to parallelize and mesh["dp"] to fully_shard'
        )


def _check_parameters(root: nn.Module, state: TensorParallel) -> None:
    """ValueError where DTensors could not be known by their names, or would lose a hook."""
    gone = state.missing_from({name for name, _ in all_named_parameters(root)})
    if gone is not None:
        raise ValueError(
            f"fully_shard: {gone} is not a parameter of {type(root).__name__}: adapters have "
            "made another module the sharded model; keep that module, as get_peft_model "
            "returns it, and call it"
        )
    hooked = next(iter(grad_hooks(state.plan, state.group)), None)
    if hooked is not None:
        raise ValueError(
            f"fully_shard: the gradient of {state.plan.entries[hooked].name} is summed over the "
            "TP group by a hook on it, as it is a parameter of the model itself or is read in "
            "full, and fully_shard makes another parameter of it; give it to a module of its own"
        )
