# SPDX-License-Identifier: Apache-2.0
"""Checks of the optimizer steps of a sharded model in a loop without DeepSpeed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.fully_shard import (
    fully_sharded_modules,
    is_distributed,
    local_part,
    reshard,
)
from deepspeed_autotp.interop.optimizer_parts import refuse_unlike_on_parts
from deepspeed_autotp.interop.optimizers import refuse_optimizer_over_tensors
from deepspeed_autotp.interop.torch_private import forward_pre_hooks
from deepspeed_autotp.interop.wrappers import all_named_parameters
from deepspeed_autotp.state.comparison_hook import ComparisonHook
from deepspeed_autotp.state.fully_shard import CheckFullyShard, follow_fully_shard
from deepspeed_autotp.state.sharded_model import TensorParallel, owner_of
from deepspeed_autotp.state.torch_clipping import let_torch_clip


class _BeforeStep:
    """A hook of every optimizer, for those that step parameters of one sharded model.

    ValueError where the optimizer would update a shard by a number over the tensor, or over all
    parameters of this rank, and in steps 1, 2, 4, 8, ... where parameters of the model were
    replaced or added: all ranks have the same optimizer. Else the step is noted: how many
    there were, and the norm of a replicated parameter's gradient, which is equal on all ranks.
    """

    def __init__(self, state: TensorParallel) -> None:
        self._state = weakref.ref(state)
        self._plain = {id(p): weakref.ref(p) for p in state.parameters}  # before fully_shard
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # that may step shards
        self._others = 0  # steps of what is not in the plan
        self.steps = 0
        self.norm: Tensor | None = None

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        state = self._state()
        if state is None:
            return
        model = state.root  # or None, where adapters were added and their model is gone
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        unknown = any(is_distributed(p) and owner_of(p) is None for p in parameters)
        if model is not None and unknown:
            follow_fully_shard(model, state)
        entries = [(p, entry) for p in parameters if (entry := state.entry(p)) is not None]
        if any(entry.is_sharded for _, entry in entries) and optimizer not in self._known:
            refuse_optimizer_over_tensors(optimizer, before="the optimizer of a sharded model")
            refuse_unlike_on_parts(optimizer, before="the optimizer of a sharded model")
            self._known.add(optimizer)
        self.steps += bool(entries)
        self._others += not entries
        calls = self.steps if entries else self._others
        if model is not None and calls.bit_count() == 1:  # now and then
            reshard(model)  # after a forward without a backward some are no DTensors
            own = {id(p) for p in model.parameters()}
            if any(id(p) in own for p in parameters):
                _refuse_changed(model, state)
            if any(self._is_of_before(p) and id(p) not in own for p in parameters):
                _refuse_early(optimizer, model)
        replicated = [p for p, entry in entries if not entry.is_sharded and p.grad is not None]
        if replicated:
            smallest: Tensor = min(replicated, key=torch.numel)
            assert smallest.grad is not None
            self.norm = torch.linalg.vector_norm(local_part(smallest.grad).float())

    def _is_of_before(self, parameter: Tensor) -> bool:
        """Whether it was sharded; fully_shard may have replaced it in the model since."""
        plain = self._plain.get(id(parameter))
        return plain is not None and plain() is parameter


def _refuse_changed(model: nn.Module, state: TensorParallel) -> None:
    """ValueError where ``model`` does not train with the parameters that were sharded, alone."""
    parameters = dict(all_named_parameters(model))
    gone = state.missing_from(parameters)
    if gone is not None:
        raise ValueError(
            f"{gone} is not a parameter of {type(model).__name__} any more: its module was "
            "replaced after the model was sharded, and what took its place knows nothing of "
            "other ranks; exchange modules before, and import peft before for adapters after"
        )
    planned = {entry.name for entry in state.plan.entries}  # without other names of a module
    unknown = (name for name, p in parameters.items() if state.entry(p) is None)
    added = next((name for name in unknown if name not in planned), None)
    if added is not None:
        raise ValueError(
            f"{added} was added to {type(model).__name__} after it was sharded: beside shards "
            "its gradient is a part of the sum on each rank, which nothing adds up; add it "
            "before (adapters of PEFT may come after)"
        )
    state.check_identity(model)


def _refuse_early(optimizer: Optimizer, model: nn.Module) -> None:
    """ValueError where ``optimizer`` has parameters that fully_shard has replaced."""
    if fully_sharded_modules(model):
        raise ValueError(
            f"{type(optimizer).__name__} has parameters that fully_shard has replaced, and would "
            f"not train {type(model).__name__}; make the optimizer after fully_shard"
        )


class _CompareSteps(ComparisonHook):
    """In calls 2, 4, 8, ... the ranks compare their last optimizer step.

    ValueError on every rank where one clipped by the norm of its shards, or skipped a step, which
    would let the ranks drift apart. Not in each call, and in no optimizer step: a rank that skips
    it would be missing.
    """

    def __init__(self, group: TPGroup, steps: _BeforeStep) -> None:
        super().__init__(first=2)
        self._group = group
        self._steps = steps

    def compare(self, module: nn.Module, *, call: int) -> None:
        group, norm = self._group, self._steps.norm
        sent = torch.zeros(2, dtype=torch.float64, device=next(module.parameters()).device)
        sent[0] = self._steps.steps
        if norm is not None:
            sent[1] = norm
        found = torch.stack(group.all_gather(sent, [sent.shape] * group.size))
        # Kernels may round in another place on another rank; clipping by shards differs by more.
        if torch.allclose(found, found[:1], rtol=1e-2, atol=0.0, equal_nan=True):
            return
        steps, norms = found.unbind(1)
        raise ValueError(
            f"the ranks {list(group.global_ranks)} of the TP group of {type(module).__name__} took "
            f"{[int(n) for n in steps]} optimizer steps, the last with gradients of a replicated "
            f"parameter of the norms {norms.tolist()}, expected equal ones; clip with "
            "torch.nn.utils.clip_grad_norm_ or deepspeed_autotp.clip_grad_norm_(model, max_norm), "
            "and scale a float16 loss with deepspeed_autotp.GradScaler: a norm of your own, and "
            "the scaler of torch, are of the shards of one rank"
        )


def check_optimizers(state: TensorParallel) -> None:
    """Check the steps of a sharded model from now on, as long as ``state`` is there, and let torch
    clip its gradients by their norm."""
    let_torch_clip()
    check_fully_shard = CheckFullyShard(state)
    before_step = _BeforeStep(state)
    handle = register_optimizer_step_pre_hook(before_step)
    weakref.finalize(state, handle.remove)
    compare = _CompareSteps(state.group, before_step)

    def register(model: nn.Module) -> None:
        for hook in (check_fully_shard, compare):
            if hook not in forward_pre_hooks(model):
                model.register_forward_pre_hook(hook)

    state.hook(register)
