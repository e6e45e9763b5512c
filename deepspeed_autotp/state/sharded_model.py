# SPDX-License-Identifier: Apache-2.0
"""The state of a sharded model: its plan and TP group, and the gathering of its full weights.

Reads the plan's entries and moves tensors accordingly; decides nothing.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp._core import Entry, Plan
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.transport import ShardSizes, Transport
from deepspeed_autotp.interop.bitsandbytes import is_4bit
from deepspeed_autotp.interop.deepspeed.auto_ep import ExpertBlock
from deepspeed_autotp.interop.deepspeed.master_weights import MasterWeights
from deepspeed_autotp.interop.deepspeed.parameters import is_shard_of_others
from deepspeed_autotp.interop.module_state import find_state, set_state
from deepspeed_autotp.interop.peft import ModuleChanges
from deepspeed_autotp.interop.torch_private import forward_pre_hooks
from deepspeed_autotp.interop.wrappers import all_named_parameters, unwrapped
from deepspeed_autotp.native import packing
from deepspeed_autotp.state.grad_sync import register_grad_hooks

# Of all models, so that a parameter alone leads to its own.
_states: weakref.WeakSet[TensorParallel] = weakref.WeakSet()


def shard_of(full: Tensor, *, entry: Entry, rank: int) -> Tensor:
    """The shard of ``full`` that ``rank`` holds, as a new tensor."""
    return packing.pack(full, view=entry.view, runs=entry.runs(rank), shape=entry.local_shape(rank))


def shard_sizes(tensor: Tensor, entry: Entry, ranks: int) -> ShardSizes:
    """Of the shards of ``entry`` in the dtype of ``tensor``."""
    nbytes = [math.prod(entry.local_shape(rank)) * tensor.itemsize for rank in range(ranks)]
    return ShardSizes(f"{entry.name} ({tensor.dtype})", tuple(nbytes))


class TensorParallel:
    """What a sharded model carries; :func:`tensor_parallel` returns it.

    ``parameters[i]`` is the tensor of ``plan.entries[i]``; sharding keeps its identity.
    ``settings`` are the values of the configuration that it was sharded with, as text, and
    ``recipe`` what its plan was made from (planning/plan_recipe.py).
    """

    def __init__(
        self,
        *,
        plan: Plan,
        group: TPGroup,
        parameters: tuple[nn.Parameter, ...],
        settings: Mapping[str, str],
        recipe: Mapping[str, Any] | None,
    ) -> None:
        self.settings = settings
        self.recipe = recipe
        self.group = group
        self.set_plan(plan, parameters)
        # Of parameters that are full for now: their own memory, and how often they are held.
        self._held: dict[int, tuple[Tensor, int]] = {}
        self.masters: MasterWeights | None = None  # of DeepSpeed's optimizer, where there is one
        self.model: weakref.ref[nn.Module] | None = None  # what carries it; None for a copy
        self.changes: ModuleChanges | None = None  # None for a copy
        self.expert_blocks: tuple[ExpertBlock, ...] = ()  # that AutoEP has replaced
        self._hook: list[Callable[[nn.Module], None]] = []  # what registers hooks, once on a module
        group.join(self)
        _states.add(self)

    def set_plan(self, plan: Plan, parameters: tuple[nn.Parameter, ...]) -> None:
        """Another plan for the same shards, as when modules were added to the model, or other
        parameters for the same plan, as fully_shard makes them."""
        self.plan = plan
        self.parameters = parameters
        self._index = {id(p): i for i, p in reversed(list(enumerate(parameters)))}

    @property
    def root(self) -> nn.Module | None:
        """The model with the names of the plan; None for a copy, and where it is gone."""
        return None if self.model is None else self.model()

    def root_in(self, model: nn.Module) -> nn.Module:
        """As ``root``; where there is none, the outermost module of ``model`` with this state."""
        if self.root is not None:
            return self.root
        own = (each for each in model.modules() if find_state(each, TensorParallel) is self)
        return next(own, model)

    def hook(self, register: Callable[[nn.Module], None]) -> None:
        """Let ``register`` give the model its hooks, now and where PEFT makes another module the
        model. What it holds must not hold this state."""
        assert self.root is not None
        register(self.root)
        self._hook.append(register)

    def hook_root(self) -> None:
        """Give the model its hooks: another one than before, or again, which changes nothing."""
        assert self.root is not None
        for register in self._hook:
            register(self.root)

    @property
    def is_gathered(self) -> bool:
        """Whether some parameters are full for now."""
        return bool(self._held)

    @property
    def device(self) -> torch.device:
        """The device of the shards."""
        return self.parameters[0].device

    def entry(self, parameter: Tensor) -> Entry | None:
        """The plan's entry of ``parameter``, or None for a tensor that is not in the plan."""
        found = self._index.get(id(parameter))
        return None if found is None else self.plan.entries[found]

    def is_sharded(self, parameter: Tensor) -> bool:
        """Whether this rank has a shard of ``parameter`` alone."""
        entry = self.entry(parameter)
        return entry is not None and entry.is_sharded

    def check_identity(self, model: nn.Module) -> None:
        """ValueError when a parameter of the model is not the one that was sharded.

        ``model`` is that model, inside of it or around it.
        """
        known = {e.name: p for e, p in zip(self.plan.entries, self.parameters, strict=True)}
        for name, parameter in all_named_parameters(self.root_in(model)):
            if known.get(name, parameter) is not parameter:
                raise ValueError(
                    f"{name} was replaced after the model was sharded, so its shard of the full "
                    "weight is not known; load weights with load_state_dict(assign=False)"
                )

    def missing_from(self, names: Container[str]) -> str | None:
        """The first name of the plan that is not among ``names``."""
        return next((entry.name for entry in self.plan.entries if entry.name not in names), None)

    def counts_in_norm(self, index: int) -> bool:
        """Whether this rank counts some of parameter ``index`` in the gradient norm.

        A shard counts on its rank, a run that several ranks hold on the lowest of them. A
        replicated parameter counts on none here: DeepSpeed counts that of TP rank 0 anyway.
        """
        return self.plan.entries[index].is_counted(self.group.rank)

    def gather(self, shard: Tensor, *, entry: Entry) -> Tensor:
        """The full tensor on every rank. Every rank calls it, in the same order."""
        ranks = range(self.group.size)
        shards = self.group.all_gather(shard.detach(), [entry.local_shape(r) for r in ranks])
        return unsharded(shards, entry)

    def gather_to_cpu(
        self, shard: Tensor, *, entry: Entry, transport: Transport, all_ranks: bool
    ) -> Tensor | None:
        """The full tensor on the CPU: on all ranks, or on TP rank 0 and None elsewhere.

        All ranks call it, as ``gather``. On the device of a contiguous shard it takes the same
        memory for any size.
        """
        shard, sizes = shard.detach(), shard_sizes(shard, entry, self.group.size)
        if self.group.rank and not all_ranks:
            transport.gather(shard, None, sizes)
            return None
        shapes = [entry.local_shape(rank) for rank in range(self.group.size)]
        into = [torch.empty(shape, dtype=shard.dtype, device="cpu") for shape in shapes]
        if all_ranks:
            transport.all_gather(shard, into, sizes)
        else:
            transport.gather(shard, into, sizes)
        return unsharded(into, entry)

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorParallel:
        """The state of a copy of the model: its parameters, with gradient hooks of their own."""
        parameters = tuple(copy.deepcopy(parameter, memo) for parameter in self.parameters)
        list(register_grad_hooks(self.plan, parameters, self.group))
        return TensorParallel(
            plan=self.plan,
            group=self.group,
            parameters=parameters,
            settings=self.settings,
            recipe=self.recipe,
        )

    # DeepSpeed's protocol: it gathers and partitions the parameters of one module at a time.

    @torch.no_grad()
    def gather_params(self, params_list: list[Tensor | None]) -> None:
        """Gather every sharded parameter of the list to its full tensor, in place."""
        for parameter, entry in self._sharded_parameters(params_list):
            self.hold(parameter, entry=entry)

    @torch.no_grad()
    def _tp_partition(self, params_list: list[Tensor | None]) -> None:
        """Shard what ``gather_params`` gathered, into the memory of the shards.

        The optimizer may own that memory: ZeRO updates one flat buffer for many weights.
        """
        for parameter, entry in self._sharded_parameters(params_list):
            if self._held[id(parameter)][1] == 1:
                self.write_held(parameter, entry=entry)
            self.release(parameter)

    def hold(self, parameter: Tensor, *, entry: Entry) -> None:
        """Let a parameter be its full tensor, in other memory, until it is released as often."""
        refuse_sharded_4bit("gathering parameters", [parameter])
        data, depth = self._held.get(id(parameter), (parameter.data, 0))
        if depth == 0:
            is_sharded = entry.is_sharded
            parameter.data = self.gather(parameter, entry=entry) if is_sharded else data.clone()
        self._held[id(parameter)] = data, depth + 1

    def held(self, parameter: Tensor) -> Tensor | None:
        """The memory of a parameter that is held, or None; of a sharded one that of its shard."""
        return self._held.get(id(parameter), (None, 0))[0]

    def write_held(self, parameter: Tensor, *, entry: Entry) -> None:
        """Write the full tensor of a held parameter into its memory."""
        full = parameter.detach()
        if entry.is_sharded:
            full = shard_of(full, entry=entry, rank=self.group.rank)
        self._held[id(parameter)][0].copy_(full)

    def release(self, parameter: Tensor) -> None:
        """Undo one ``hold``; what was not written is gone."""
        data, depth = self._held.pop(id(parameter))
        if depth > 1:
            self._held[id(parameter)] = data, depth - 1
        else:
            parameter.data = data

    def _sharded_parameters(
        self, params_list: list[Tensor | None]
    ) -> Iterator[tuple[Tensor, Entry]]:
        for parameter in params_list:
            entry = None if parameter is None else self.entry(parameter)
            if parameter is not None and entry is not None and entry.is_sharded:
                yield parameter, entry


def sharded_4bit(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those of ``parameters`` of which a rank has a shard in 4 bits."""
    wanted = [p for p in parameters if is_4bit(p)]
    return [p for p in wanted if (state := owner_of(p)) is not None and state.is_sharded(p)]


def refuse_sharded_4bit(called: str, parameters: Iterable[Tensor]) -> None:
    """ValueError for ``called``, which needs full tensors, where a rank has a shard in 4 bits."""
    if sharded_4bit(parameters):
        raise ValueError(
            f"{called}: got shards of weights in 4 bits of bitsandbytes, expected weights in "
            "floating point: shards in 4 bits are not gathered; save the adapter with "
            "deepspeed_autotp.save_pretrained(model, folder), the weights themselves do not change"
        )


def unsharded(shards: Sequence[Tensor], entry: Entry) -> Tensor:
    """The full tensor of ``shards``, in rank order."""
    full = shards[0].new_empty(entry.shape)
    for rank, shard in enumerate(shards):
        packing.unpack_(full, shard, view=entry.view, runs=entry.runs(rank))
    return full


def attach(model: nn.Module, state: TensorParallel) -> None:
    """Make ``model`` carry ``state``, and refuse its forward while parameters are full."""
    set_state(model, state)
    state.model = weakref.ref(model)
    if _refuse_held not in forward_pre_hooks(model):
        model.register_forward_pre_hook(_refuse_held)
    state.hook_root()


def _refuse_held(model: nn.Module, args: object) -> None:
    # By the module, as a copy of it has a state of its own.
    state = find_state(model, TensorParallel)
    if state is not None and state.is_gathered:
        raise RuntimeError(
            f"{type(model).__name__} was called while gather_params holds full parameters of it, "
            "with which layers would sum full results over the ranks; call it after the context"
        )


def tensor_parallel(model: nn.Module) -> TensorParallel:
    """The state of a sharded model, or of the one inside an engine or wrapper.

    ValueError when ``model`` is not sharded.
    """
    found = find_tensor_parallel(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} is not sharded; pass it to deepspeed_autotp.initialize or "
            "deepspeed_autotp.parallelize first"
        )
    return found


def destroy(model: nn.Module) -> None:
    """Close the process groups and the shared memory that were made for a sharded model.

    Every rank calls it, for every copy of the model; groups that you gave, or that DeepSpeed made,
    stay open. The model keeps its shards, and runs no more: save it before. The ``destroy`` of
    DeepSpeed's engine does this for the model that its ``initialize`` has sharded. ValueError when
    ``model`` is not sharded.
    """
    state = tensor_parallel(model)
    state.group.leave(state)


def find_tensor_parallel(model: nn.Module) -> TensorParallel | None:
    """As :func:`tensor_parallel`, with None instead of the error."""
    for inner in unwrapped(model):
        found = find_state(inner, TensorParallel)
        if found is not None:
            return found
    return None


def owner_of(parameter: Tensor) -> TensorParallel | None:
    """The state of the sharded model that has ``parameter``, or None."""
    return next((state for state in list(_states) if state.entry(parameter) is not None), None)


def container_of(parameters: Iterable[Tensor]) -> TensorParallel | None:
    """The state of the sharded model that has one of ``parameters``, or None; also one that
    fully_shard has made."""
    wanted = set(map(id, parameters))
    for state in list(_states):
        root = state.root
        held = [*state.parameters, *([] if root is None else root.parameters())]
        if not wanted.isdisjoint(map(id, held)):
            return state
    return None


def owners_of_gradients(gradients: Iterable[Tensor]) -> dict[int, tuple[Tensor, TensorParallel]]:
    """The parameter and the sharded model of each gradient that is one of a sharded model, by the
    id of the gradient; fully_shard may have made the parameter."""
    wanted = set(map(id, gradients))
    found: dict[int, tuple[Tensor, TensorParallel]] = {}
    for state in list(_states):
        root = state.root
        for parameter in (*state.parameters, *([] if root is None else root.parameters())):
            if parameter.grad is not None and id(parameter.grad) in wanted:
                found[id(parameter.grad)] = parameter, state
    return found


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The sharded module inside an engine or wrapper; the innermost where none is sharded."""
    inner = model
    for inner in unwrapped(model):
        if find_state(inner, TensorParallel) is not None:
            break
    return inner


def find_nested_tensor_parallel(model: nn.Module) -> TensorParallel | None:
    """As :func:`find_tensor_parallel`, also where a submodule of ``model`` is sharded.

    Modules outside of it are replicated. ValueError for several such submodules, for a part of a
    sharded model, and for one that others have sharded.
    """
    found = (find_tensor_parallel(module) for module in model.modules())
    states = {id(state): state for state in found if state is not None}
    if len(states) > 1:
        raise ValueError(
            f"{len(states)} submodules of {type(model).__name__} are sharded separately, expected "
            "one; call this for each of them"
        )
    if not states and (whole := container_of(model.parameters())) is not None:
        name = "model" if whole.root is None else type(whole.root).__name__
        raise ValueError(
            f"{type(model).__name__} is a part of a sharded {name}, and has this rank's shards; "
            "pass the sharded model itself"
        )
    others = model.named_parameters() if not states else ()
    if (marked := next((n for n, p in others if is_shard_of_others(p)), None)) is not None:
        raise ValueError(
            f"{marked} is marked as a shard, as by a LinearLayer of DeepSpeed, and was not sharded "
            "here: its full weight is not known; use what its layers offer, or DeepSpeed's engine"
        )
    return next(iter(states.values()), None)
