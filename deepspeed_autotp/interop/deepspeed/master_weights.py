# SPDX-License-Identifier: Apache-2.0
"""The copies of parameters that DeepSpeed's optimizers update in the place of the parameters.

ZeRO updates copies in float32, also of float32 parameters, and writes them over the parameters
after the step; so does every optimizer of 16-bit parameters. A new value that only the parameter
had would be lost. An element that has not changed keeps its copy, which is more precise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deepspeed_autotp.interop.deepspeed.module import deepspeed_module
from deepspeed_autotp.interop.deepspeed.parameters import is_partitioned
from deepspeed_autotp.interop.versions import required

_DEPTH = "_ds_z3_gathered_param_context_depth"


class MasterWeights:
    """The copies that the optimizer of an engine has; ``optimizer`` is the engine's."""

    def __init__(self, optimizer: Any) -> None:
        # ZeRO and BF16_Optimizer note on a parameter where its copy is; these do not.
        self._groups = getattr(optimizer, "fp16_groups", ())
        self._flat = getattr(optimizer, "fp32_groups_flat", None)
        self._single = getattr(optimizer, "fp32_groups", None)

    def update(self, parameter: Tensor, *, before: Tensor, after: Tensor) -> None:
        """Give the copy of ``parameter`` the elements of ``after`` that differ from ``before``."""
        for copied, begin in self._copies(parameter):
            old = before.reshape(-1)[begin : begin + copied.numel()]
            new = after.reshape(-1)[begin : begin + copied.numel()]
            _take_changed(copied.view(-1), old, new)

    def _copies(self, parameter: Tensor) -> Iterator[tuple[Tensor, int]]:
        """The copies on this rank, each with the element of the parameter at which it begins."""
        fragment = getattr(parameter, "_hp_mapping", None)
        if fragment is not None:
            yield fragment.hp_fragment.data, fragment.lp_fragment_address.start
        for number, group in enumerate(self._groups):
            begin = 0
            for place, each in enumerate(group):
                if each is parameter and self._single is not None:
                    yield self._single[number][place].data, 0
                elif each is parameter and self._flat is not None:
                    yield self._flat[number].data[begin : begin + each.numel()], 0
                begin += each.numel()


def _take_changed(copied: Tensor, old: Tensor, new: Tensor) -> None:
    changed = (old != new).to(copied.device)
    copied.copy_(torch.where(changed, new.to(copied.device, copied.dtype), copied))


def is_gathered(parameter: Tensor) -> bool:
    """Whether a ``deepspeed.zero.GatheredParameters`` around this has gathered ``parameter``."""
    return bool(getattr(parameter, _DEPTH, 0))


def refuse_unwritable(parameters: Iterable[Tensor]) -> None:
    """ValueError for a parameter that is gathered from a disk."""
    for parameter in parameters:
        if getattr(parameter, "nvme_swapper", None) is not None:
            raise ValueError(
                "gather_params: modifier_rank: got parameters that offload_param keeps on nvme, "
                "expected parameters in memory; leave modifier_rank out, or offload to the CPU"
            )


@contextmanager
def rewritten_parameters(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A context in which parameters that ZeRO 3 has partitioned are gathered, and whose values at
    its end, alike on all data-parallel ranks, are kept."""
    partitioned: list[Any] = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        yield
        return
    with deepspeed_module().zero.GatheredParameters(partitioned, modifier_rank=0):
        yield
        before = [p.ds_tensor.detach().clone() for p in partitioned]
    for parameter, old in zip(partitioned, before, strict=True):
        _update_partition(parameter, old)


def _update_partition(parameter: Any, before: Tensor) -> None:
    """As :meth:`MasterWeights.update` for a parameter that is partitioned."""
    optimizer = getattr(parameter, "_z3_optimizer", None)
    if optimizer is None or not parameter.requires_grad:
        return
    copied = required(
        optimizer, "get_local_fp32_param", project="deepspeed", needed_for="gather_params"
    )(parameter)
    copied = copied.detach().clone()
    _take_changed(copied, before.reshape(-1), parameter.ds_tensor.detach().reshape(-1))
    optimizer.set_local_hp_param(copied, parameter)
