# SPDX-License-Identifier: Apache-2.0
"""Logits that are cut over the ranks as tensors: what they hold, and their place in a graph.

What torch's functions do with them is decided in logits.py, by the class that is made there.

V is the size of the vocabulary, R the number of ranks.
"""

from __future__ import annotations

import weakref
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepspeed_autotp.distributed.mappings import gather_parts
from deepspeed_autotp.vocab_parallel.logits_shard import Cut, Late, Memory
from deepspeed_autotp.vocab_parallel.soft_cap import Steps, cap_of

__all__ = ["CutLogits", "as_logits", "cast_part", "like", "put_off", "taken", "widened"]


class CutLogits(Tensor):
    """A tensor [..., V] of which this rank holds ``part``, [..., V/R].

    Shape, data type and gradient function are those of the whole tensor; there is no memory
    behind it. ``part`` may be of a smaller data type: the cast is done where somebody reads the
    numbers. The gradient is such a tensor, too, or a plain whole one.

    The steps of a soft cap are put off until somebody reads the numbers; ``held`` is a Late until
    then. A loss does not read them: it has the cap in itself and takes the logits before the
    steps, where these are ``direct``, that is, where no other operation lies between.
    """

    held: Tensor | Late
    direct: bool
    cut: Cut
    memory: Memory
    _whole: Tensor | None
    _gathered: int

    @staticmethod
    def __new__(
        cls, part: Tensor | Late, cut: Cut, memory: Memory, dtype: torch.dtype, direct: bool = False
    ) -> Self:
        made: Self = Tensor._make_wrapper_subclass(
            cls, (*part.shape[:-1], cut.parts.size), dtype=dtype, device=part.device
        )
        made.held, made.direct, made.cut, made.memory = part, direct, cut, memory
        made._whole, made._gathered = None, 0
        return made

    @property
    def part(self) -> Tensor:
        """This rank's numbers; what was put off is computed now."""
        return self.settle()

    def settle(self) -> Tensor:
        """Compute what was put off; gradients go through these logits from then on."""
        if isinstance(self.held, Late):
            self.held = self.held.read()
        return self.held

    def before_steps(self) -> tuple[Self, Steps]:
        """The logits before the steps that are put off, and these; itself where there are none."""
        late = self.held
        if isinstance(late, Late) and self.direct:
            raw = late.raw
            if isinstance(raw, type(self)) and not raw.changed() and not raw.memory.replaced:
                return raw, late.steps
        return self, ()

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
            # Who looks without gradients may come before somebody who wants them.
            with torch.inference_mode(False), torch.enable_grad():
                self._whole = _Gather.apply(self)  # type: ignore[no-untyped-call]
            self._gathered = self._whole._version
        return self._whole

    def changed(self) -> bool:
        """Whether somebody has written into what ``whole`` gave."""
        return self._whole is not None and self._whole._version != self._gathered

    def again(self) -> Self:
        """The same logits without a gradient function."""
        made = type(self)(self.held, self.cut, self.memory, self.dtype)
        if self._whole is not None:
            # Below autograd a detached tensor counts its changes anew.
            made._whole = self._whole.detach()
            made._gathered = -1 if self.changed() else made._whole._version
        return made

    def rely_on_whole(self) -> None:
        """Take the whole logits to be changed from now on."""
        self._gathered = -1


class _Spread(torch.autograd.Function):
    """A rank's part as logits."""

    @staticmethod
    def forward(
        ctx: Any,
        part: Tensor,
        kind: type[CutLogits],
        cut: Cut,
        memory: Memory,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.cut, ctx.dtype = cut, part.dtype
        return kind(part.detach(), cut, memory, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        part = dy.part if isinstance(dy, CutLogits) else ctx.cut.own(dy)
        return part.to(ctx.dtype), None, None, None, None


class _PutOff(torch.autograd.Function):
    """Steps that are done where somebody reads the numbers, and from then on in the backward."""

    @staticmethod
    def forward(ctx: Any, raw: CutLogits, memory: Memory, steps: Steps) -> Tensor:
        late = Late(raw, raw.part, raw.memory, memory, steps)
        ctx.kind, ctx.cut, ctx.dtype = type(raw), raw.cut, raw.dtype
        ctx.derivative, ctx.late = late.derivative, weakref.ref(late)
        return type(raw)(late, raw.cut, memory, raw.dtype, direct=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        late = ctx.late()
        if late is not None:
            late.read()
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        part = dy.part if isinstance(dy, CutLogits) else ctx.cut.own(dy)
        dpart = ctx.derivative.gradient(part.to(ctx.dtype), again=again)
        return ctx.kind(dpart, ctx.cut, Memory(), ctx.dtype), None, None


class _Take(torch.autograd.Function):
    """The rank's part of logits, in their data type or as it is."""

    @staticmethod
    def forward(ctx: Any, x: CutLogits, cast: bool) -> Tensor:
        ctx.kind, ctx.cut, ctx.dtype = type(x), x.cut, x.dtype
        return (cast_part(x) if cast else x.part).detach()

    @staticmethod
    def backward(ctx: Any, dpart: Tensor) -> tuple[Tensor, None]:
        return ctx.kind(dpart, ctx.cut, Memory(), ctx.dtype), None


class _Widen(torch.autograd.Function):
    """Logits of another data type; the part is cast where its numbers are read."""

    @staticmethod
    def forward(ctx: Any, x: CutLogits, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        if cap_of(x.before_steps()[1]):
            return type(x)(x.held, x.cut, x.memory, dtype, direct=True)
        return type(x)(x.part, x.cut, x.memory, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        if isinstance(dy, CutLogits):
            return type(dy)(dy.part, dy.cut, dy.memory, ctx.dtype), None
        return dy.to(ctx.dtype), None


class _Gather(torch.autograd.Function):
    """Logits as a plain tensor."""

    @staticmethod
    def forward(ctx: Any, x: CutLogits) -> Tensor:
        return gather_parts(x.part, x.cut.parts, x.cut.group).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def as_logits(
    kind: type[CutLogits], part: Tensor, cut: Cut, memory: Memory, dtype: torch.dtype
) -> CutLogits:
    """Logits of class ``kind`` whose part is ``part``."""
    logits: CutLogits = _Spread.apply(part, kind, cut, memory, dtype)  # type: ignore[no-untyped-call]
    return logits


def taken(x: CutLogits, *, cast: bool) -> Tensor:
    """The part of ``x`` as a tensor of autograd's; in the data type of ``x`` where ``cast``."""
    x.memory.check()
    part: Tensor = _Take.apply(x, cast)  # type: ignore[no-untyped-call]
    return part


def cast_part(x: CutLogits) -> Tensor:
    """The part in the data type of ``x``."""
    return x.part.to(x.dtype)


def like(x: CutLogits, part: Tensor, dtype: torch.dtype) -> CutLogits:
    """Logits of another part, which may be a view of the part of ``x``."""
    shared = part.untyped_storage().data_ptr() == x.part.untyped_storage().data_ptr()
    return as_logits(type(x), part, x.cut, x.memory if shared else Memory(), dtype)


def put_off(raw: CutLogits, memory: Memory, steps: Steps) -> CutLogits:
    """The logits after ``steps``; ``memory`` is that of their numbers."""
    logits: CutLogits = _PutOff.apply(raw, memory, steps)  # type: ignore[no-untyped-call]
    return logits


def widened(x: CutLogits, dtype: torch.dtype) -> CutLogits:
    """The same numbers in a larger data type, without a copy."""
    logits: CutLogits = _Widen.apply(x, dtype)  # type: ignore[no-untyped-call]
    return logits
