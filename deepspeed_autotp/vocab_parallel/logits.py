# SPDX-License-Identifier: Apache-2.0
"""A tensor subclass for logits: full for every user, sharded over the ranks inside.

Between the output head and the loss a model scales, caps, casts and reshapes its logits; that
is done on each rank's shard. Cross-entropy is computed from the shards. Any other operation
gathers the full logits first, on every rank, as any other collective. So no model and no loss can
see a shard, and a training step gathers nothing.

V is the size of the vocabulary, R the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from deepspeed_autotp.distributed.autograd_collectives import ShardLayout
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.vocab_parallel import logits_rules as rules
from deepspeed_autotp.vocab_parallel.cross_entropy import vocabulary_cross_entropy
from deepspeed_autotp.vocab_parallel.logits_shard import Memory, VocabularySharding
from deepspeed_autotp.vocab_parallel.logits_tensor import (
    ShardedLogits,
    as_logits,
    cast_shard,
    defer,
    like,
    local_shard,
    widened,
)
from deepspeed_autotp.vocab_parallel.soft_cap import cap_of, follows


class Logits(ShardedLogits):
    """Logits for which torch's functions give what they give for the full tensor."""

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in rules.ABOUT:
                _watch(rules.watched(func, args, named), strict=func not in rules.HOOKING)
                return func(*args, **named)
            result = _on_shards(func, args, named)
        return _on_full(func, args, named) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls below autograd: gradients, and calls that did not come from Python."""
        named = kwargs or {}
        result = _below(func, args, named)
        if result is not NotImplemented:
            return result
        # Collectives and custom operators may write without a new version of the tensor.
        writes = func.namespace != "aten" or func._schema.is_mutable

        def full(x: Logits) -> Tensor:
            plain = x.full().detach()
            if writes:
                x.rely_on_full()
            return plain

        args, named = tree_map_only(Logits, full, (tuple(args), named))
        return func(*args, **named)


def logits_from_shard(shard: Tensor, layout: ShardLayout, group: TPGroup) -> Tensor:
    """[..., V/R] -> the logits [..., V]. Nothing is communicated."""
    return as_logits(Logits, shard, VocabularySharding(layout, group), Memory(), shard.dtype)


def _watch(seen: Sequence[Any], *, strict: bool) -> None:
    """Let gradients of what is computed from now on go through ``seen``.

    RuntimeError, if ``strict``, when a loss or another view bypasses them. DeepSpeed hooks every
    output after the loss; its hook on the loss does what the one on the logits would.
    """
    for x in seen:
        if isinstance(x, Logits):
            if not x.memory.passed:
                x.settle()
            elif strict:
                raise RuntimeError(
                    "the gradient of an earlier loss or view bypasses these logits, since the loss "
                    "applies their soft cap itself; call retain_grad() or register_hook() before "
                    "the loss, hook the output of the head module, or set "
                    "tensor_parallel.vocab_parallel_lm_head to false"
                )


def _on_full(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    seen: list[Logits] = []

    def full(x: Logits) -> Tensor:
        seen.append(x)
        return x.full()

    args, kwargs = tree_map_only(Logits, full, (tuple(args), dict(kwargs)))
    result = func(*args, **kwargs)
    for x in seen:
        x.memory.replaced |= x.changed()
        if func in rules.SHARING:
            x.rely_on_full()
    return result


def _on_shards(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The call done on the rank's shard, or NotImplemented."""
    if func is F.cross_entropy:
        return _loss(args, kwargs)
    if func in rules.POINTWISE:
        return _pointwise(func, args, kwargs)
    x = args[0] if args else None
    if not isinstance(x, Logits) or x.changed():
        return NotImplemented
    raw, steps = x.before_steps()
    if cap_of(steps):
        made = _shaped(func, (raw, *args[1:]), kwargs)
        if isinstance(made, Logits):
            x.memory.check()
            x.memory.passed = True
            memory = x.memory if made.memory is raw.memory else Memory()
            return _other_dtype(defer(made, memory, steps), x.dtype)
    else:
        made = _shaped(func, args, kwargs)
    dtype = rules.cast_to(func, args, kwargs, x.device)
    return made if dtype is None else _other_dtype(x, dtype)


def _shaped(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Rows that are selected, copied or of another shape, or NotImplemented."""
    x = args[0]
    if func in rules.SHAPING and not kwargs:
        shape = rules.other_shape(func, x.shape, args[1:])
        if shape is None:
            return NotImplemented
        shard = local_shard(x, cast=False)
        local = (*shape[:-1], shard.shape[-1])
        shard = shard.view(local) if func is Tensor.view else shard.reshape(local)
        return like(x, shard, x.dtype)
    if func is Tensor.__getitem__ and rules.keeps_columns(args[1], x.dim()):
        return like(x, local_shard(x, cast=False)[args[1]], x.dtype)
    if func in rules.COPYING and not args[1:] and not kwargs:
        return like(x, func(local_shard(x, cast=False)), x.dtype)
    return NotImplemented


def _other_dtype(x: ShardedLogits, dtype: torch.dtype) -> ShardedLogits:
    if dtype == x.dtype:
        return x
    if dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
        return widened(x, dtype)
    return like(x, local_shard(x, cast=True).to(dtype), dtype)


def _pointwise(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    values = (*args, *kwargs.values())
    ours = [value for value in values if isinstance(value, Logits)]
    if not ours or "out" in kwargs or not all(_fits(ours[0], value) for value in values):
        return NotImplemented
    x = ours[0]
    step = rules.step(func, args, kwargs)
    if step is not None and x is args[0]:
        raw, steps = x.before_steps()
        if not follows(step, steps):
            raw, steps = x, ()
        if follows(step, steps):
            x.memory.check()
            x.memory.passed |= raw is not x
            return defer(raw, Memory(), (*steps, step))
    operands = [_operand(x, value) for value in values]
    result = func(*operands[: len(args)], **dict(zip(kwargs, operands[len(args) :], strict=True)))
    made = like(x, result, result.dtype)
    if func not in rules.FORGETFUL or values[0] is not x or len(ours) > 1:
        for one in (*ours, made):
            one.memory.kept = True
    return made


def _fits(x: Logits, value: Any) -> bool:
    """Whether ``value`` can be combined with ``x`` on each rank alone."""
    if isinstance(value, Logits):
        return value.sharding == x.sharding and not value.changed()
    if not isinstance(value, Tensor):
        return True
    # Each rank would have a part of its gradient only; with full logits it is complete.
    if value.requires_grad:
        return False
    return value.dim() == 0 or value.shape[-1] in (1, x.shape[-1])


def _operand(x: Logits, value: Any) -> Any:
    if isinstance(value, Logits):
        return local_shard(value, cast=True)
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] == x.shape[-1]:
        return x.sharding.shard_of(value)
    return value


def _loss(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Cross-entropy from the shards, as ``F.cross_entropy`` reduces and casts it."""
    call = rules.loss_call(args, kwargs)
    if call is None or not isinstance(call.logits, Logits) or call.logits.changed():
        return NotImplemented
    x = call.logits
    raw, steps = x.before_steps()
    if not cap_of(steps):
        raw, steps = x, ()
    memory, source = x.memory, raw.memory
    memory.check()
    source.losses += 1
    if steps:
        memory.losses += 1
        memory.passed = True
    losses = vocabulary_cross_entropy(
        local_shard(raw, cast=False),
        call.labels,
        layout=raw.sharding.layout,
        group=raw.sharding.group,
        ignore_index=call.ignore_index,
        overwrite=lambda: source.may_overwrite(memory),
        soft_cap=cap_of(steps),
    )
    dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    if call.reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    if call.reduction == "mean":
        total = total / (call.labels != call.ignore_index).sum()
    return total.to(dtype)


_ATEN = torch.ops.aten


def _below(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What autograd itself does with tensors and their gradients, or NotImplemented."""
    if func is _ATEN.add.Tensor and not kwargs:
        return _sum_of_gradients(*args)
    x = args[0] if args else None
    if not isinstance(x, Logits) or x.changed():
        return NotImplemented
    same_shape = func is _ATEN.view.default and tuple(args[1]) == tuple(x.shape)
    if same_shape or func in (_ATEN.detach.default, _ATEN.alias.default):
        return x.again()
    if func is _ATEN._to_copy.default and list(kwargs) == ["dtype"]:
        return Logits(x.shard, x.sharding, x.memory, kwargs["dtype"])
    return NotImplemented


def _sum_of_gradients(x: Any, y: Any) -> Any:
    """Of a shard and a full gradient, or of two shards."""
    shardings = {
        value.sharding for value in (x, y) if isinstance(value, Logits) and not value.changed()
    }
    tensors = isinstance(x, Tensor) and isinstance(y, Tensor)
    if len(shardings) != 1 or not tensors or x.shape != y.shape:
        return NotImplemented
    sharding = shardings.pop()
    a, b = (
        cast_shard(value) if isinstance(value, Logits) else sharding.shard_of(value)
        for value in (x, y)
    )
    total = a + b
    return Logits(total, sharding, Memory(), total.dtype)
