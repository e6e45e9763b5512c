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

from deepspeed_autotp import logits_rules as rules
from deepspeed_autotp.collectives import Parts, gather_parts
from deepspeed_autotp.group import TPGroup
from deepspeed_autotp.logits_part import Cut, Memory
from deepspeed_autotp.loss import vocabulary_cross_entropy


class Logits(Tensor):
    """A tensor [..., V] of which this rank holds ``part``, [..., V/R].

    Shape, data type and gradient function are those of the whole tensor; there is no memory
    behind it. ``part`` may be of a smaller data type: the cast is done where somebody reads the
    numbers. The gradient is such a tensor, too, or a plain whole one.
    """

    part: Tensor
    cut: Cut
    memory: Memory
    _whole: Tensor | None
    _gathered: int

    @staticmethod
    def __new__(cls, part: Tensor, cut: Cut, memory: Memory, dtype: torch.dtype) -> Logits:
        made: Logits = Tensor._make_wrapper_subclass(
            cls, (*part.shape[:-1], cut.parts.size), dtype=dtype, device=part.device
        )
        made.part, made.cut, made.memory = part, cut, memory
        made._whole, made._gathered = None, 0
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        # Printing on one rank must not wait for the others, so there are no numbers here.
        return f"Logits({list(self.shape)}, {self.dtype}; whole when used)"

    def __format__(self, spec: str) -> str:
        return object.__format__(self, spec)

    def whole(self) -> Tensor:
        """The whole logits, gathered at the first call. Every rank calls it.

        RuntimeError when the gradient has taken the place of the logits.
        """
        if self._whole is None:
            self.memory.check()
            with torch.enable_grad():
                self._whole = _Gather.apply(self)  # type: ignore[no-untyped-call]
            self._gathered = self._whole._version
        return self._whole

    def changed(self) -> bool:
        """Whether somebody has written into what ``whole`` gave."""
        return self._whole is not None and self._whole._version != self._gathered

    def again(self) -> Logits:
        """The same logits without a gradient function."""
        made = Logits(self.part, self.cut, self.memory, self.dtype)
        if self._whole is not None:
            made._whole, made._gathered = self._whole.detach(), self._gathered
        return made

    def rely_on_whole(self) -> None:
        """Take the whole logits to be changed from now on."""
        self._gathered = -1

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
    return _made(part, Cut(parts, group), Memory(), part.dtype)


class _Spread(torch.autograd.Function):
    """A rank's part as logits."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, cut: Cut, memory: Memory, dtype: torch.dtype) -> Tensor:
        ctx.cut, ctx.dtype = cut, part.dtype
        return Logits(part.detach(), cut, memory, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        part = dy.part if isinstance(dy, Logits) else ctx.cut.own(dy)
        return part.to(ctx.dtype), None, None, None


class _Take(torch.autograd.Function):
    """The rank's part of logits, in their data type or as it is."""

    @staticmethod
    def forward(ctx: Any, x: Logits, cast: bool) -> Tensor:
        ctx.cut, ctx.dtype = x.cut, x.dtype
        return (_cast(x) if cast else x.part).detach()

    @staticmethod
    def backward(ctx: Any, dpart: Tensor) -> tuple[Tensor, None]:
        return Logits(dpart, ctx.cut, Memory(), ctx.dtype), None


class _Widen(torch.autograd.Function):
    """Logits of another data type; the part is cast where its numbers are read."""

    @staticmethod
    def forward(ctx: Any, x: Logits, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        return Logits(x.part, x.cut, x.memory, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        if isinstance(dy, Logits):
            return Logits(dy.part, dy.cut, dy.memory, ctx.dtype), None
        return dy.to(ctx.dtype), None


class _Gather(torch.autograd.Function):
    """Logits as a plain tensor."""

    @staticmethod
    def forward(ctx: Any, x: Logits) -> Tensor:
        return gather_parts(x.part, x.cut.parts, x.cut.group).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def _made(part: Tensor, cut: Cut, memory: Memory, dtype: torch.dtype) -> Tensor:
    made: Tensor = _Spread.apply(part, cut, memory, dtype)  # type: ignore[no-untyped-call]
    return made


def _taken(x: Logits, *, cast: bool) -> Tensor:
    x.memory.check()
    part: Tensor = _Take.apply(x, cast)  # type: ignore[no-untyped-call]
    return part


def _cast(x: Logits) -> Tensor:
    return x.part.to(x.dtype)


def _like(x: Logits, part: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of another part, which may be a view of the part of ``x``."""
    shared = part.untyped_storage().data_ptr() == x.part.untyped_storage().data_ptr()
    return _made(part, x.cut, x.memory if shared else Memory(), dtype)


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
    if func in rules.SHAPING and not kwargs:
        shape = rules.other_shape(func, x.shape, args[1:])
        if shape is None:
            return NotImplemented
        part = _taken(x, cast=False)
        local = (*shape[:-1], part.shape[-1])
        part = part.view(local) if func is Tensor.view else part.reshape(local)
        return _like(x, part, x.dtype)
    if func is Tensor.__getitem__ and rules.keeps_columns(args[1], x.dim()):
        return _like(x, _taken(x, cast=False)[args[1]], x.dtype)
    if func in rules.COPYING and not args[1:] and not kwargs:
        return _like(x, func(_taken(x, cast=False)), x.dtype)
    dtype = rules.cast_to(func, args, kwargs, x.device)
    return NotImplemented if dtype is None else _other_dtype(x, dtype)


def _other_dtype(x: Logits, dtype: torch.dtype) -> Tensor:
    if dtype == x.dtype:
        return x
    if dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
        widened: Tensor = _Widen.apply(x, dtype)  # type: ignore[no-untyped-call]
        return widened
    return _like(x, _taken(x, cast=True).to(dtype), dtype)


def _pointwise(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    values = (*args, *kwargs.values())
    ours = [value for value in values if isinstance(value, Logits)]
    if not ours or "out" in kwargs or not all(_fits(ours[0], value) for value in values):
        return NotImplemented
    x = ours[0]
    operands = [_operand(x, value) for value in values]
    result = func(*operands[: len(args)], **dict(zip(kwargs, operands[len(args) :], strict=True)))
    made = _like(x, result, result.dtype)
    if func not in rules.FORGETFUL or values[0] is not x or len(ours) > 1:
        for one in (*ours, made):
            assert isinstance(one, Logits)
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
        return _taken(value, cast=True)
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] == x.shape[-1]:
        return x.cut.own(value)
    return value


def _loss(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Cross-entropy from the parts, as ``F.cross_entropy`` reduces and casts it."""
    call = rules.loss_call(args, kwargs)
    if call is None or not isinstance(call.logits, Logits) or call.logits.changed():
        return NotImplemented
    x = call.logits
    x.memory.losses += 1
    losses = vocabulary_cross_entropy(
        _taken(x, cast=False),
        call.labels,
        parts=x.cut.parts,
        group=x.cut.group,
        ignore_index=call.ignore_index,
        overwrite=x.memory.may_overwrite,
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
    a, b = (_cast(value) if isinstance(value, Logits) else cut.own(value) for value in (x, y))
    total = a + b
    return Logits(total, cut, Memory(), total.dtype)
