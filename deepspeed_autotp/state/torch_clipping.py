# SPDX-License-Identifier: Apache-2.0
"""torch's own ``clip_grad_norm_`` and ``get_total_norm``, given gradients of a sharded model.

They see the shards of one rank, and of fully_shard's DTensors those of one data-parallel mesh: each
TP rank would scale by another norm. Both form the norm by one function, in whose place is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from deepspeed_autotp.interop.replaced import Replaced, put_method
from deepspeed_autotp.interop.torch_private import total_norm_names
from deepspeed_autotp.state.fully_shard import follow_fully_shard
from deepspeed_autotp.state.grad_norm import GradNorm
from deepspeed_autotp.state.sharded_model import TensorParallel, owners_of_gradients

_REPLACED = Replaced()  # in this process, as what it replaces is


def let_torch_clip() -> None:
    """From now on the norm that torch clips by is that of the unsharded model, for gradients of a
    sharded one; any others as ever. Calling it twice is harmless."""
    for owner, name in total_norm_names():
        put_method(_REPLACED, owner, name, _total_norm)


@torch.no_grad()
def _total_norm(
    original: Callable[..., Tensor],
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """As torch's function; all ranks of the TP group call it. A tensor that is the gradient of no
    parameter counts as replicated."""
    gradients = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    owners = owners_of_gradients(gradients)
    if not owners:
        return original(gradients, norm_type, error_if_nonfinite, foreach)
    state, order = _checked(owners), float(norm_type)
    if not order > 0:
        raise ValueError(
            f"clip_grad_norm_: norm_type: got {norm_type} for gradients of a sharded model, "
            "expected a number above 0 or infinity"
        )
    if (root := state.root) is not None:
        follow_fully_shard(root, state)
    pairs = [(owners.get(id(each), (each, state))[0], each) for each in gradients]
    dtype = torch.float32
    for gradient in gradients:
        dtype = torch.promote_types(dtype, gradient.dtype)
    norm = GradNorm(state).of(pairs, order=order).to(dtype)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(
            f"The total norm of order {order} for gradients from `parameters` is non-finite, so it "
            "cannot be clipped. To disable this error and scale the gradients by the non-finite "
            "norm anyway, set `error_if_nonfinite=False`"
        )
    return norm


def _checked(owners: dict[int, tuple[Tensor, TensorParallel]]) -> TensorParallel:
    states = {id(state): state for _, state in owners.values()}
    if len(states) > 1:
        raise ValueError(
            "clip_grad_norm_: got gradients of several sharded models, expected those of one; "
            "call it for each of them"
        )
    return next(iter(states.values()))
