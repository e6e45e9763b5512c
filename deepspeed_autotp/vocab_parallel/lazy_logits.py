# SPDX-License-Identifier: Apache-2.0
"""Logits of which this rank has its columns: from the output head to the loss, and in the outputs.

Steps by numbers that the model takes on the way to the loss are noted, and taken on any columns.
All else that is asked of the logits gathers them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspeed_autotp.distributed.autograd_collectives import ShardLayout, gather_from_tp_region
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.torch_private import (
    in_autograd_function,
    version_counter,
    with_leaves,
)
from deepspeed_autotp.vocab_parallel.cross_entropy import vocabulary_cross_entropy

_OVERWRITTEN = (
    "these logits are used for the first time after the backward pass, which has overwritten them "
    "with their gradient; before loss.backward(), take what you need of them, such as "
    "outputs.logits.argmax(-1), or outputs.logits.full(); or set "
    "tensor_parallel.vocab_parallel_lm_head to false"
)
_GRADIENT = (
    "{}: no gradient of outputs.logits is formed, since the loss is computed from the shards of "
    "the ranks; hook the output head with register_full_backward_hook before the forward, or set "
    "tensor_parallel.vocab_parallel_lm_head to false"
)
_FUNCTION = (
    "an autograd.Function was given outputs.logits, which are no tensor to it, so their gradient "
    "would be lost; give it outputs.logits.full()"
)
_OF_GRADIENT = frozenset(
    {"grad", "retain_grad", "retains_grad", "register_hook", "requires_grad_"}
    | {"register_post_accumulate_grad_hook"}
)
_OPERATORS = (
    *("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "matmul", "rmatmul"),
    *("truediv", "rtruediv", "itruediv", "floordiv", "rfloordiv", "mod", "pow", "rpow", "ipow"),
    *("neg", "pos", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor"),
    *("getitem", "setitem", "iter", "bool", "int", "float", "contains", "array"),
)
_NAMES = frozenset(dir(Tensor))
_OF_SHAPE = ("shape", "dtype", "ndim", "size", "dim", "numel", "is_floating_point")
_OF_SHARD = ("device", "requires_grad")
# Steps that give the same on any columns, by what they are called as and the function they are.
_STEPS: Mapping[Any, Callable[..., Tensor]] = {
    "float": Tensor.float,
    **dict.fromkeys(("tanh", torch.tanh), Tensor.tanh),
    **dict.fromkeys(("div", "__truediv__", torch.div), Tensor.div),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", torch.mul), Tensor.mul),
}
_SOFT_CAP = (Tensor.div, Tensor.tanh, Tensor.mul)


@dataclass(slots=True)
class Step:
    """One forward of a model: while it runs steps are noted, and one loss is formed from shards.

    ``in_function``: it runs within an autograd.Function, as a re-entrant checkpoint of all of it.
    """

    is_running: bool = True
    has_loss: bool = False
    in_function: bool = False

    def refuse_function(self) -> None:
        """RuntimeError within an autograd.Function that is not around the whole forward."""
        if in_autograd_function() != self.in_function:
            raise RuntimeError(_FUNCTION)


class LazyLogits:
    """The logits [..., V], of which this rank has the shard [..., V/R].

    Not a tensor, so that what traverses outputs for tensors passes them by. Any function of torch,
    and any attribute or operator of a tensor but those of its shape, gathers the full logits: every
    rank does that or none, and for the first time before the backward. Gradients flow from them to
    the shards. They do not include that of the loss, so to ask for theirs is an error.

    In the model's forward ``float``, ``tanh``, and factors that are numbers give a LazyLogits.
    """

    __slots__ = ("_empty", "_full", "_group", "_layout", "_shard", "_step", "_taken", "_version")
    __hash__ = object.__hash__

    def __init__(
        self,
        shard: Tensor,
        layout: ShardLayout,
        group: TPGroup,
        *,
        step: Step | None = None,
        taken: tuple[tuple[Callable[..., Tensor], tuple[float, ...]], ...] = (),
    ) -> None:
        self._shard, self._layout, self._group = shard, layout, group
        self._step = Step(is_running=False) if step is None else step
        self._taken = taken
        is_cast = any(function is Tensor.float for function, _ in taken)
        dtype = torch.float32 if is_cast else shard.dtype
        shape = (*shard.shape[:-1], layout.size)
        self._empty = torch.empty(shape, dtype=dtype, device="meta")  # which says what it knows
        self._version = version_counter(shard)
        self._full: Tensor | None = None

    def losses(self, labels: Tensor, ignore_index: int, *, columns: int) -> Tensor | None:
        """The cross-entropy of each token, formed from the shards; None where it takes the full
        logits: they were gathered, and maybe written to, there are not as many ``columns``, or the
        gradient of another loss will be written over the shard."""
        self._step.refuse_function()
        step, computed = self._step, [x for x in self._taken if x[0] is not Tensor.float]
        if self._full is not None or columns != self._layout.size:
            return None
        if step.has_loss or not step.is_running:
            return None
        step.has_loss = torch.is_grad_enabled()  # or nothing is written over the shard
        functions = tuple(function for function, _ in computed)
        cap = computed[0][1][0] if functions == _SOFT_CAP else 0.0
        is_capped = cap > 0 and cap == computed[2][1][0]
        # The loss computes in float32 anyhow.
        before, after = self._shard.dtype, self._empty.dtype
        is_exact = before == after or before.itemsize < after.itemsize
        if not (is_exact and (is_capped or not computed)):
            with torch.set_grad_enabled(self._shard.requires_grad):
                for function, numbers in self._taken:
                    self._shard = function(self._shard, *numbers)
            self._taken, self._version, cap = (), version_counter(self._shard), 0.0
        return vocabulary_cross_entropy(
            self._shard.reshape(labels.numel(), self._shard.shape[-1]),
            labels,
            layout=self._layout,
            group=self._group,
            ignore_index=ignore_index,
            overwrite=is_capped or functions[-1:] != (Tensor.tanh,),  # which reads its result
            soft_cap=cap,
        )

    def result(self) -> LazyLogits | Tensor:
        """As the model returns them: full ones of which the loss was formed are a tensor."""
        return self if self._full is None or self._step.has_loss else self._full

    def full(self) -> Tensor:
        """The full logits, gathered at the first call. Every rank calls it."""
        self._step.refuse_function()
        if self._full is None:
            if version_counter(self._shard) != self._version:
                raise RuntimeError(_OVERWRITTEN)
            # A use without gradients may come before one with gradients, and one in a checkpoint,
            # which runs again and does not gather again, before others. A hook that keeps the
            # result of tanh itself would make a cycle with its node, which nothing frees.
            own = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda x: x)
            with torch.inference_mode(False), torch.enable_grad(), own:
                full = gather_from_tp_region(self._shard, self._layout, self._group)
                for function, numbers in self._taken:
                    full = function(full, *numbers)
                if self._taken and self._taken[-1][0] is Tensor.tanh:
                    full = full.clone()  # which a user may write to
            self._full = full
        return self._full

    def _noted(self, name: Any, args: Sequence[Any]) -> LazyLogits | None:
        """These logits after a step by numbers, or None for what needs their values."""
        function = _STEPS.get(name)
        if function is None or self._full is not None:
            return None
        if not self._step.is_running and function is not Tensor.float:  # as Accelerate calls it
            return None
        numbers = [x for x in args if type(x) in (int, float)]
        wanted = 1 if function in (Tensor.mul, Tensor.div) else 0
        if not len(args) == len(numbers) == wanted:
            return None
        if self._shard.requires_grad and not torch.is_grad_enabled():
            return None  # the step has no gradient
        if function is Tensor.float and self._empty.dtype == torch.float32:
            return self
        taken = (*self._taken, (function, tuple(args)))
        made = LazyLogits(self._shard, self._layout, self._group, step=self._step, taken=taken)
        made._version = self._version
        return made

    def contiguous(self, **kwargs: Any) -> Any:
        return self if self._step.is_running and not kwargs else self.full().contiguous(**kwargs)

    def __len__(self) -> int:
        return len(self._empty)

    def __repr__(self) -> str:
        # Without values: printing on one rank must not wait for the others.
        return f"LazyLogits({list(self._empty.shape)}, {self._empty.dtype}; gathered when used)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.full().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.full().__deepcopy__(memo)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_GRADIENT:
            raise RuntimeError(_GRADIENT.format(name))
        if name not in _NAMES:
            raise AttributeError(f"logits have no attribute {name!r}")
        if name in _OF_SHAPE:
            return self._empty.__getattribute__(name)
        if name in _OF_SHARD:
            return self._shard.__getattribute__(name)
        return self.full().__getattribute__(name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.autograd.grad, torch.autograd.backward):
            raise RuntimeError(_GRADIENT.format(f"torch.autograd.{func.__name__}"))
        if args and isinstance(args[0], LazyLogits) and not kwargs:
            noted = args[0]._noted(func, args[1:])
            if noted is not None:
                return noted
        args, named = with_leaves(LazyLogits, LazyLogits.full, (tuple(args), dict(kwargs or {})))
        return func(*args, **named)


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: LazyLogits, *args: Any, **kwargs: Any) -> Any:
        noted = None if kwargs else self._noted(name, args)
        if noted is not None:
            return noted
        operator = self.full().__getattribute__(name)
        return operator(*(a.full() if isinstance(a, LazyLogits) else a for a in args), **kwargs)

    return apply


for _each in (*(f"__{name}__" for name in _OPERATORS), "float", "tanh", "mul", "div"):
    setattr(LazyLogits, _each, _operator(_each))
