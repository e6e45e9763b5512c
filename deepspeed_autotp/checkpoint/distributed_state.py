# SPDX-License-Identifier: Apache-2.0
"""A model and its optimizer as torch.distributed.checkpoint (DCP) saves and loads them.

    state = deepspeed_autotp.checkpoint_state(model, optimizer)
    torch.distributed.checkpoint.save(state, checkpoint_id=folder)
    torch.distributed.checkpoint.load(state, checkpoint_id=folder)

The checkpoint has the tensors of the unsharded model under their names, in the form of torch's own
``get_model_state_dict`` and ``get_optimizer_state_dict``: what wrote it is not to be seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepspeed_autotp.checkpoint.expert_weights import refuse_experts
from deepspeed_autotp.checkpoint.optimizer_state import OptimizerState
from deepspeed_autotp.checkpoint.ranks import ranks_of_run
from deepspeed_autotp.checkpoint.shard_tensor import Given, placed
from deepspeed_autotp.config.validation import wrong
from deepspeed_autotp.interop.deepspeed.module import is_engine
from deepspeed_autotp.interop.distributed_checkpoint import asked_by_distributed_checkpoint
from deepspeed_autotp.interop.optimizers import refuse_optimizer_over_tensors
from deepspeed_autotp.interop.torch_private import state_dict_pre_hooks
from deepspeed_autotp.interop.wrappers import all_named_parameters, without_wrappers
from deepspeed_autotp.state.fully_shard import settle_parameters
from deepspeed_autotp.state.sharded_model import (
    TensorParallel,
    find_nested_tensor_parallel,
    refuse_sharded_4bit,
    unwrapped_model,
)

__all__ = ["checkpoint_state"]

# The end of the name of what a module's get_extra_state gives.
_EXTRA_STATE = "_extra_state"


def checkpoint_state(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """``{"model": ..., "optimizer": ...}`` for ``save``, ``async_save`` and ``load`` of
    torch.distributed.checkpoint.

    model       sharded or not, also within DDP, or with fully_shard over the data-parallel mesh
    optimizer   of torch, over parameters of ``model``; made after fully_shard

    Each rank writes and reads what it holds of the full tensors, at any TP size and number of
    data-parallel ranks. Add what else the loop has: ``state["scheduler"] = scheduler``. Every rank
    of the run calls it. ValueError on all of them for an engine of DeepSpeed, an optimizer of
    another model, and one whose update of a shard is not that of the full tensor.
    """
    with ranks_of_run("checkpoint_state") as ranks:
        return ranks.together(lambda: _checked(model, optimizer))


def _checked(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"checkpoint_state: model: {wrong(model, 'a torch.nn.Module')}")
    inner, state = unwrapped_model(model), find_nested_tensor_parallel(model)
    if is_engine(model) or (state is not None and state.masters is not None):
        raise ValueError(
            "checkpoint_state: model: got an engine of DeepSpeed, whose optimizer has the weights "
            "in other forms; expected a model of a loop without DeepSpeed: call "
            "engine.save_checkpoint and engine.load_checkpoint"
        )
    refuse_sharded_4bit("checkpoint_state: model", inner.parameters())
    refuse_experts("checkpoint_state: model", state, inner)
    made: dict[str, Any] = {"model": ModelState(inner, state)}
    made["model"].state_dict()  # or its error, now
    if optimizer is None:
        return made
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"checkpoint_state: optimizer: {wrong(optimizer, 'a torch.optim.Optimizer')}"
        )
    if state is not None:
        refuse_optimizer_over_tensors(optimizer, before="checkpoint_state: optimizer")
    made["optimizer"] = OptimizerState(inner, state, optimizer)
    return made


def refuse_own_state(state: TensorParallel) -> None:
    """From now on an error where torch.distributed.checkpoint asks the sharded model itself for its
    ``state_dict``: it would take one rank's shards for replicas of one tensor."""

    def register(model: nn.Module) -> None:
        if _refuse_if_asked not in state_dict_pre_hooks(model):
            model.register_state_dict_pre_hook(_refuse_if_asked)

    state.hook(register)


def _refuse_if_asked(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    if asked_by_distributed_checkpoint():
        raise ValueError(
            "torch.distributed.checkpoint: got the state_dict of a sharded "
            f"{type(model).__name__}, which has this rank's shards, and which it would take for "
            "replicas of one tensor; expected deepspeed_autotp.checkpoint_state(model, optimizer), "
            "which save, async_save and load take in place of the model, of get_model_state_dict "
            "and of get_state_dict; full tensors are deepspeed_autotp.full_state_dict(model)"
        )


class ModelState:
    """The weights and buffers of ``model``; a ``Stateful`` of torch.distributed.checkpoint.

    Tied names are each in it, as in the model's own ``state_dict``.
    """

    def __init__(self, model: nn.Module, state: TensorParallel | None) -> None:
        self._model = model
        self._state = state
        self._given = Given({})
        self._names: dict[str, str] = {}  # in the model's own state, by those that are given
        self._copies: dict[str, Tensor] = {}  # that are not the model's own tensors

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Full shapes by full names, in the memory of the model's tensors."""
        settle_parameters(self._model, self._state)
        given = self._model.state_dict(keep_vars=True)
        self._names = {without_wrappers(name): name for name in given}
        found = {name: given[inner] for name, inner in self._names.items()}
        own: dict[str, Tensor] = dict(all_named_parameters(self._model))
        for name, buffer in self._model.named_buffers(remove_duplicate=False):
            own[without_wrappers(name)] = buffer
        known = {id(tensor) for tensor in own.values()}
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        self._copies = {name: value for name, value in tensors.items() if id(value) not in known}
        made = dict(found)
        for name, value in tensors.items():
            source = own.get(name) if name in self._copies else value
            made[name] = self._value(name, value, source)
        self._given = Given(made)
        return made

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what is no tensor of the model; those were read in place."""
        self._given.check(state_dict)
        others = {n: value for n, value in state_dict.items() if not isinstance(value, Tensor)}
        others |= {name: self._copies[name] for name in state_dict.keys() & self._copies.keys()}
        if others:
            named = {self._names.get(name, name): value for name, value in others.items()}
            self._model.load_state_dict(named, strict=False)

    def _value(self, name: str, value: Tensor, source: Tensor | None) -> Tensor:
        """``source`` is the parameter or buffer whose value it is; None where it is of no such."""
        if self._state is None:
            return value.detach()
        if source is None and name.rpartition(".")[2] != _EXTRA_STATE:
            raise ValueError(
                f"checkpoint_state: {name}: got a tensor that a hook or a module's own state_dict "
                "made, expected the name of a parameter or a buffer: which elements of the full "
                "tensor it has is not known; give it from get_extra_state, or register a buffer"
            )
        entry = None if source is None else self._state.entry(source)
        if entry is None or not entry.is_sharded:
            return value.detach()
        rank = self._state.group.rank
        if tuple(value.shape) != entry.local_shape(rank):
            raise ValueError(
                f"checkpoint_state: {name}: got a shard of shape {list(value.shape)}, expected "
                f"{list(entry.local_shape(rank))}; its shape was changed after the model was "
                "sharded: leave gather_params first, and write into parameters in place"
            )
        return placed(value, entry, rank)
