# SPDX-License-Identifier: Apache-2.0
"""Column layers with the same input share one all-reduce of its gradient, overlapped with dw.

q, k and v, or gate and up, take the same hidden states. Autograd sums the gradients of a rank's
layers, and one all-reduce sums over the ranks; while it is in flight, the gradients of the weights
are computed.

x    [T, I]     replicated; T tokens, I input features
x'   [T, I]     = x, what the layers compute with
y_i  [T, O/R]   = x' @ w_i.T + b_i

dx'  = sum_i dy_i @ w_i        in the backward of each layer
dx   = sum over ranks of dx'   started in the backward of the entry
dw_i = dy_i.T @ x              computed there, before the wait for dx

Where x was gathered from the ranks' tokens (sequence_parallel.stack), the entry takes the place of
the gather: its dx is this rank's rows of the sum, by a reduce-scatter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed_autotp.distributed.autograd_collectives import copy_to_tp_region
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.sequence_collectives import (
    GatheredSequence,
    padded_gradient,
    rows_with_summed_gradient,
)
from deepspeed_autotp.interop.deepspeed.parameters import is_partitioned
from deepspeed_autotp.interop.first_derivatives import once_differentiable
from deepspeed_autotp.interop.torch_private import backward_id, version_counter


def _tokens(x: Tensor) -> Tensor:
    """``[..., F] -> [T, F]``."""
    return x.reshape(-1, x.shape[-1])


def _with_lead_of(x: Tensor, y: Tensor) -> Tensor:
    """``[T, F]`` as ``[..., F]``, where ``x`` is ``[..., I]``."""
    return y if y.dim() == x.dim() else y.reshape(*x.shape[:-1], y.shape[-1])


class _DeferredGradients:
    """Output gradients of an entry's layers, from their backward to that of the entry.

    ``index`` gives the index of a weight, by its id, among the entry's. A backward pass that
    ends between the two leaves gradients behind, which the next one drops.
    """

    __slots__ = ("_deferred", "_pass", "index")

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.index = {id(weight): index for index, weight in enumerate(weights)}
        self._pass = -1
        self._deferred: list[tuple[int, Tensor, bool]] = []

    def put(self, index: int, dy: Tensor, *, transposed: bool) -> None:
        current = backward_id()
        if current != self._pass:
            self._pass = current
            self._deferred.clear()
        self._deferred.append((index, dy, transposed))

    def weight_gradients(self, x: Tensor) -> list[Tensor | None]:
        """Of this backward pass, in the order of the weights; None where there is none."""
        gradients: list[Tensor | None] = [None] * len(self.index)
        if self._pass != backward_id():
            self._deferred.clear()
        x = _tokens(x)
        while self._deferred:
            index, dy, transposed = self._deferred.pop()
            dw = x.t().mm(_tokens(dy)) if transposed else _tokens(dy).t().mm(x)
            before = gradients[index]  # of a layer that was called twice
            gradients[index] = dw if before is None else before.add_(dw)
        return gradients


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shared: SharedInput,
        deferred: _DeferredGradients,
        gathered: GatheredSequence | None,
        *weights: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shared, ctx.deferred = shared, deferred
        ctx.layout = None if gathered is None else gathered.layout
        ctx.shape = x.shape
        full = x if gathered is None else gathered.full.detach()
        if weights:
            ctx.save_for_backward(full)
        return full.view_as(full)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        ctx.shared.forget()
        work = None
        group: TPGroup = ctx.shared.group
        if dx is not None and ctx.layout is not None:
            rows = padded_gradient(dx, ctx.layout)
            work, dx = group.start_reduce_scatter(rows, ctx.layout.widths)
            dx = dx.reshape(ctx.shape)
        elif dx is not None:
            # From the layers' matmuls, or autograd's sum of them: nothing else refers to it.
            dx = dx.contiguous()
            work = group.start_all_reduce(dx)
        try:
            gradients = ctx.deferred.weight_gradients(*saved) if saved else []
        finally:
            if work is not None:
                work.wait()
        return dx, None, None, None, *gradients


class _Linear(torch.autograd.Function):
    """A linear without the gradient of its weight, which the entry computes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        deferred: _DeferredGradients,
        transposed: bool,
    ) -> Tensor:
        ctx.deferred, ctx.index, ctx.transposed = deferred, deferred.index[id(weight)], transposed
        rows = weight.t() if transposed else weight
        ctx.save_for_backward(rows)
        return F.linear(x, rows, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        ctx.deferred.put(ctx.index, dy, transposed=ctx.transposed)
        db = _tokens(dy).sum(0) if ctx.needs_input_grad[2] else None
        return dy.matmul(rows), None, db, None, None


@dataclass(frozen=True, slots=True)
class _EntryRecord:
    """``y`` is what the layers compute with that are given ``x`` at its ``version``."""

    x: Tensor
    version: int
    y: Tensor
    deferred: _DeferredGradients


class SharedInput:
    """The input that the column layers of a model were given last; one per conversion.

    Without ``overlap`` autograd computes the gradients of the weights before the all-reduce.
    """

    def __init__(self, group: TPGroup, *, overlap: bool) -> None:
        self.group = group
        self._overlap = overlap
        self._last: _EntryRecord | None = None
        self._gathered: GatheredSequence | None = None
        # Under torch.compile, where the rest of a record would break the graph.
        self._traced_x: Tensor | None = None
        self._traced_y: Tensor | None = None
        self._remaining = 0
        self._copied_from = ""

    def refuse_gradients(self, model: str) -> None:
        """RuntimeError from now on where gradients would be formed: these layers were copied from
        ``model`` without it."""
        self._copied_from = model

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

        x         [..., I], replicated; its gradient is summed over the ranks
        siblings  parameters of the layers, this one among them, likely to be given ``x``, too
        """
        rows = weight.t() if transposed else weight
        if self._copied_from and torch.is_grad_enabled() and weight.requires_grad:
            raise RuntimeError(
                f"a part of a sharded {self._copied_from} was copied, and is trained; its "
                "gradients would not be summed over the ranks: copy the model as a whole, or copy "
                "the part before it is sharded"
            )
        if torch.compiler.is_compiling():
            return _with_lead_of(x, F.linear(self._traced(x, siblings), rows, bias))
        if not (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, rows, bias)
        entry = self._enter(x, siblings)
        # Under autocast the layer computes with a copy of its weight in another dtype.
        if id(weight) not in entry.deferred.index or torch.is_autocast_enabled(x.device.type):
            return F.linear(entry.y, rows, bias)
        y: Tensor = _Linear.apply(entry.y, weight, bias, entry.deferred, transposed)  # type: ignore[no-untyped-call]
        return y

    def shared(self, x: Tensor, *, siblings: Sequence[Mapping[str, Tensor | None]]) -> Tensor:
        """What a layer with a frozen weight computes with that is given ``x``; as ``linear``."""
        if torch.compiler.is_compiling():
            return _with_lead_of(x, self._traced(x, siblings))
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        return self._enter(x, siblings).y

    def set_gathered(self, gathered: GatheredSequence) -> None:
        """The next layers are likely to be given ``gathered.full``."""
        self._gathered = gathered

    def forget(self) -> None:
        """Drop the references to the last input: autograd alone decides how long a tensor lives."""
        self._gathered = None
        self._last = self._traced_x = self._traced_y = None

    def __deepcopy__(self, memo: object) -> SharedInput:
        """One without an input, for the copy of a model."""
        made = SharedInput(self.group, overlap=self._overlap)
        made._copied_from = self._copied_from
        return made

    def _enter(self, x: Tensor, siblings: Sequence[Mapping[str, Tensor | None]]) -> _EntryRecord:
        last = self._last
        # The same tensor, not only equal values, and not written to in between.
        if last is None or last.x is not x or last.version != version_counter(x):
            weights = _deferrable_weights(siblings, x) if self._overlap else []
            deferred = _DeferredGradients(weights)
            gathered = self._gathered
            if gathered is None or not gathered.is_full(x):
                y = _Enter.apply(x, self, deferred, None, *weights)  # type: ignore[no-untyped-call]
            else:
                y = _Enter.apply(gathered.shard, self, deferred, gathered, *weights)  # type: ignore[no-untyped-call]
            last = _EntryRecord(x, version_counter(x), y, deferred)
            self._last, self._remaining = last, len(siblings)
        self._remaining -= 1
        if self._remaining <= 0:
            self.forget()
        return last

    def _traced(self, x: Tensor, siblings: Sequence[Mapping[str, Tensor | None]]) -> Tensor:
        """As ``_enter``, for torch.compile, which neither defers gradients nor overlaps sums.

        ``[T, I]`` where ``x`` was gathered: inductor overlaps a gather with a product right behind.
        """
        y = self._traced_y
        if self._traced_x is not x or y is None:
            gathered = self._gathered
            if gathered is None or not gathered.is_full(x):
                y = copy_to_tp_region(x, self.group)
            else:
                y = rows_with_summed_gradient(gathered, self.group)
            self._traced_x, self._traced_y, self._remaining = x, y, len(siblings)
        self._remaining -= 1
        if self._remaining <= 0:
            self.forget()
        return y


def _deferrable_weights(siblings: Sequence[Mapping[str, Tensor | None]], x: Tensor) -> list[Tensor]:
    """The weights whose gradients an entry of ``x`` can compute."""
    if torch.is_autocast_enabled(x.device.type):
        return []
    weights = [parameters.get("weight") for parameters in siblings]
    # With ZeRO 3 a weight is available in its own module's forward and backward only.
    return [w for w in weights if w is not None and w.requires_grad and not is_partitioned(w)]
