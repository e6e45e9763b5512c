# SPDX-License-Identifier: Apache-2.0
"""Column layers that are handed one tensor share the sum of its gradient.

q, k and v, or gate and up, take the same hidden states, and each rank has the gradients that its
parts of them give. Autograd adds these up on the rank and one all-reduce adds up the ranks; while
that is on its way, the gradients of the weights are formed.

x    [T, I]     replicated; T tokens, I input features
x'   [T, I]     = x, what the layers compute with
y_i  [T, O/R]   = x' @ w_i.T + b_i

dx'  = sum_i dy_i @ w_i        in the backward of each layer
dx   = sum over ranks of dx'   started in the backward of the entry
dw_i = dy_i.T @ x              formed there, before dx is waited for

Where x was gathered from the tokens of the ranks (sequence_parallel.stack), the entry stands in
the place of the gathering: its dx is the sum for this rank's own tokens, and a reduce-scatter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepspeed_autotp.distributed.mappings import copy_to_ranks
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.sequence_mappings import Gathered
from deepspeed_autotp.interop import is_partitioned


def _tokens(x: Tensor) -> Tensor:
    """``[..., F] -> [T, F]``."""
    return x.reshape(-1, x.shape[-1])


class _Stash:
    """Output gradients of an entry's layers, from their backward to that of the entry.

    ``places`` gives the place of a weight, by its id, among the entry's. A backward pass that
    ends between the two leaves something behind, which the next one drops.
    """

    __slots__ = ("_held", "_pass", "places")

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.places = {id(weight): place for place, weight in enumerate(weights)}
        self._pass = -1
        self._held: list[tuple[int, Tensor, bool]] = []

    def put(self, place: int, dy: Tensor, *, transposed: bool) -> None:
        current = torch._C._current_graph_task_id()
        if current != self._pass:
            self._pass = current
            self._held.clear()
        self._held.append((place, dy, transposed))

    def weight_gradients(self, x: Tensor) -> list[Tensor | None]:
        """From what has been put in this pass, in the order of the weights; None for nothing."""
        formed: list[Tensor | None] = [None] * len(self.places)
        if self._pass != torch._C._current_graph_task_id():
            self._held.clear()
        x = _tokens(x)
        while self._held:
            place, dy, transposed = self._held.pop()
            dw = x.t().mm(_tokens(dy)) if transposed else _tokens(dy).t().mm(x)
            before = formed[place]  # a layer that was called twice
            formed[place] = dw if before is None else before.add_(dw)
        return formed


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shared: SharedInput,
        stash: _Stash,
        gathered: Gathered | None,
        *weights: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shared, ctx.stash = shared, stash
        ctx.tokens = None if gathered is None else gathered.tokens
        ctx.shape = x.shape
        whole = x if gathered is None else gathered.whole.detach()
        if weights:
            ctx.save_for_backward(whole)
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        ctx.shared.forget()
        started = None
        group: TPGroup = ctx.shared.group
        if dx is not None and ctx.tokens is not None:
            started, dx = group.start_reduce_scatter(_tokens(dx), ctx.tokens.widths)
            dx = dx.reshape(ctx.shape)
        elif dx is not None:
            # From the layers' matmuls, or autograd's sum of them: nobody else holds it.
            dx = dx.contiguous()
            started = group.start_all_reduce(dx)
        try:
            formed = ctx.stash.weight_gradients(*saved) if saved else []
        finally:
            if started is not None:
                started.wait()
        return dx, None, None, None, *formed


class _Linear(torch.autograd.Function):
    """A linear without the gradient of its weight, which the entry forms."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stash: _Stash, transposed: bool
    ) -> Tensor:
        ctx.stash, ctx.place, ctx.transposed = stash, stash.places[id(weight)], transposed
        rows = weight.t() if transposed else weight
        ctx.save_for_backward(rows)
        return F.linear(x, rows, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        ctx.stash.put(ctx.place, dy, transposed=ctx.transposed)
        db = _tokens(dy).sum(0) if ctx.needs_input_grad[2] else None
        return dy.matmul(rows), None, db, None, None


@dataclass(frozen=True, slots=True)
class _Entered:
    """``y`` is what the layers compute with that are given ``x`` at its ``version``."""

    x: Tensor
    version: int
    y: Tensor
    stash: _Stash


class SharedInput:
    """The tensor that the column layers of a model were given last; one per conversion.

    Without ``overlap`` autograd forms the gradients of the weights before the sum begins.
    """

    def __init__(self, group: TPGroup, *, overlap: bool) -> None:
        self.group = group
        self._overlap = overlap
        self._last: _Entered | None = None
        self._gathered: Gathered | None = None
        # Of a graph that is traced: the rest of a record would break it.
        self._traced_x: Tensor | None = None
        self._traced_y: Tensor | None = None
        self._awaited = 0

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        siblings: Sequence[Mapping[str, Tensor | None]],
        transposed: bool = False,
    ) -> Tensor:
        """``x @ weight.T + bias``, ``weight`` without ``.T`` where it is ``transposed``.

        x         [..., I], the same on every rank; its gradient is summed over them
        siblings  parameters of the layers, this one among them, likely to be given ``x``, too
        """
        rows = weight.t() if transposed else weight
        if torch.compiler.is_compiling():
            return F.linear(self._traced(x, siblings), rows, bias)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, rows, bias)
        entered = self._enter(x, siblings)
        # Under autocast the layer computes with a copy of its weight in another dtype.
        if id(weight) not in entered.stash.places or torch.is_autocast_enabled(x.device.type):
            return F.linear(entered.y, rows, bias)
        y: Tensor = _Linear.apply(entered.y, weight, bias, entered.stash, transposed)  # type: ignore[no-untyped-call]
        return y

    def gathered(self, gathered: Gathered) -> None:
        """The layers that come next are likely to be given ``gathered.whole``."""
        self._gathered = gathered

    def forget(self) -> None:
        """Let go of what entered last: autograd alone decides how long a tensor lives."""
        self._gathered = None
        self._last = self._traced_x = self._traced_y = None

    def __deepcopy__(self, memo: object) -> SharedInput:
        """One that nothing has entered, for the copy of a model."""
        return SharedInput(self.group, overlap=self._overlap)

    def _enter(self, x: Tensor, siblings: Sequence[Mapping[str, Tensor | None]]) -> _Entered:
        last = self._last
        # One tensor, and not only equal values; and not written to in between.
        if last is None or last.x is not x or last.version != x._version:
            weights = _trained_here(siblings, x) if self._overlap else []
            stash = _Stash(weights)
            gathered = self._gathered
            if gathered is None or not gathered.is_whole(x):
                y = _Enter.apply(x, self, stash, None, *weights)  # type: ignore[no-untyped-call]
            else:
                y = _Enter.apply(gathered.own, self, stash, gathered, *weights)  # type: ignore[no-untyped-call]
            last = _Entered(x, x._version, y, stash)
            self._last, self._awaited = last, len(siblings)
        self._awaited -= 1
        if self._awaited <= 0:
            self.forget()
        return last

    def _traced(self, x: Tensor, siblings: Sequence[Mapping[str, Tensor | None]]) -> Tensor:
        """As ``_enter``; a graph has neither passes to tell apart nor sums that are under way."""
        y = self._traced_y
        if self._traced_x is not x or y is None:
            y = copy_to_ranks(x, self.group)
            self._traced_x, self._traced_y, self._awaited = x, y, len(siblings)
        self._awaited -= 1
        if self._awaited <= 0:
            self.forget()
        return y


def _trained_here(siblings: Sequence[Mapping[str, Tensor | None]], x: Tensor) -> list[Tensor]:
    """The weights whose gradients an entry of ``x`` can form."""
    if torch.is_autocast_enabled(x.device.type):
        return []
    weights = [parameters.get("weight") for parameters in siblings]
    # With ZeRO 3 a weight is there around its own module's forward and backward only.
    return [w for w in weights if w is not None and w.requires_grad and not is_partitioned(w)]
