# SPDX-License-Identifier: Apache-2.0
"""Logits that are whole to everybody and cut over the ranks inside.

Between the output head and the loss a model scales, caps, casts and reshapes its logits; that
is done on each rank's part. Cross-entropy is formed from the parts. Whatever else is done with
them is done with the whole logits, gathered then: by every rank, as any other collective. So no
model and no loss can see a part, and a step that only trains gathers nothing.

V is the size of the vocabulary, R the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from deepspeed_autotp.distributed.mappings import Parts
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.vocab_parallel import logits_rules as rules
from deepspeed_autotp.vocab_parallel.cross_entropy import vocabulary_cross_entropy
from deepspeed_autotp.vocab_parallel.logits_shard import Cut, Memory
from deepspeed_autotp.vocab_parallel.logits_tensor import (
    CutLogits,
    as_logits,
    cast_part,
    like,
    put_off,
    taken,
    widened,
)
from deepspeed_autotp.vocab_parallel.soft_cap import cap_of, follows


class Logits(CutLogits):
    """Logits of which torch's functions make what they make of the whole tensor."""

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
            result = _by_parts(func, args, named)
        return _by_whole(func, args, named) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What arrives below autograd: gradients, and calls that are not Python's."""
        named = kwargs or {}
        result = _below(func, args, named)
        if result is not NotImplemented:
            return result
        # What collectives and other people's operations write is not counted as a change.
        writes = func.namespace != "aten" or func._schema.is_mutable

        def whole(x: Logits) -> Tensor:
            plain = x.whole().detach()
            if writes:
                x.rely_on_whole()
            return plain

        args, named = tree_map_only(Logits, whole, (tuple(args), named))
        return func(*args, **named)


def spread(part: Tensor, parts: Parts, group: TPGroup) -> Tensor:
    """[..., V/R] -> the logits [..., V]. Nothing is communicated."""
    return as_logits(Logits, part, Cut(parts, group), Memory(), part.dtype)


def _watch(seen: Sequence[Any], *, strict: bool) -> None:
    """Have gradients of what is computed from now on go through ``seen``.

    RuntimeError, if ``strict``, when a loss or another view has gone past them. DeepSpeed hooks
    every output after the loss; its hook on the loss does what the one on the logits would.
    """
    for x in seen:
        if isinstance(x, Logits):
            if not x.memory.passed:
                x.settle()
            elif strict:
                raise RuntimeError(
                    "the gradient of a loss or a view that was formed before goes past these "
                    "logits, whose soft cap it has in itself; ask for theirs before it is formed, "
                    "hook the output of the head module, or set "
                    "tensor_parallel.vocab_parallel_lm_head to false"
                )


def _by_whole(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    seen: list[Logits] = []

    def whole(x: Logits) -> Tensor:
        seen.append(x)
        return x.whole()

    args, kwargs = tree_map_only(Logits, whole, (tuple(args), dict(kwargs)))
    result = func(*args, **kwargs)
    for x in seen:
        x.memory.replaced |= x.changed()
        if func in rules.SHARING:
            x.rely_on_whole()
    return result


def _by_parts(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The call done on the rank's part, or NotImplemented."""
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
            return _other_dtype(put_off(made, memory, steps), x.dtype)
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
        part = taken(x, cast=False)
        local = (*shape[:-1], part.shape[-1])
        part = part.view(local) if func is Tensor.view else part.reshape(local)
        return like(x, part, x.dtype)
    if func is Tensor.__getitem__ and rules.keeps_columns(args[1], x.dim()):
        return like(x, taken(x, cast=False)[args[1]], x.dtype)
    if func in rules.COPYING and not args[1:] and not kwargs:
        return like(x, func(taken(x, cast=False)), x.dtype)
    return NotImplemented


def _other_dtype(x: CutLogits, dtype: torch.dtype) -> CutLogits:
    if dtype == x.dtype:
        return x
    if dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
        return widened(x, dtype)
    return like(x, taken(x, cast=True).to(dtype), dtype)


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
            return put_off(raw, Memory(), (*steps, step))
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
        return value.cut == x.cut and not value.changed()
    if not isinstance(value, Tensor):
        return True
    # A part gives a part of the gradient only; the sum over ranks is the whole logits' way.
    if value.requires_grad:
        return False
    return value.dim() == 0 or value.shape[-1] in (1, x.shape[-1])


def _operand(x: Logits, value: Any) -> Any:
    if isinstance(value, Logits):
        return taken(value, cast=True)
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] == x.shape[-1]:
        return x.cut.own(value)
    return value


def _loss(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Cross-entropy from the parts, as ``F.cross_entropy`` reduces and casts it."""
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
        taken(raw, cast=False),
        call.labels,
        parts=raw.cut.parts,
        group=raw.cut.group,
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
    """What autograd itself does with its tensors and their gradients, or NotImplemented."""
    if func is _ATEN.add.Tensor and not kwargs:
        return _sum_of_gradients(*args)
    x = args[0] if args else None
    if not isinstance(x, Logits) or x.changed():
        return NotImplemented
    same_shape = func is _ATEN.view.default and tuple(args[1]) == tuple(x.shape)
    if same_shape or func in (_ATEN.detach.default, _ATEN.alias.default):
        return x.again()
    if func is _ATEN._to_copy.default and list(kwargs) == ["dtype"]:
        return Logits(x.part, x.cut, x.memory, kwargs["dtype"])
    return NotImplemented


def _sum_of_gradients(x: Any, y: Any) -> Any:
    """Of a part and a whole gradient, or of two parts."""
    cuts = {value.cut for value in (x, y) if isinstance(value, Logits) and not value.changed()}
    tensors = isinstance(x, Tensor) and isinstance(y, Tensor)
    if len(cuts) != 1 or not tensors or x.shape != y.shape:
        return NotImplemented
    cut = cuts.pop()
    a, b = (cast_part(value) if isinstance(value, Logits) else cut.own(value) for value in (x, y))
    total = a + b
    return Logits(total, cut, Memory(), total.dtype)
