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
from deepspeed_autotp.vocab_parallel.cross_entropy import loss_task, vocabulary_cross_entropy
from deepspeed_autotp.vocab_parallel.fused_loss import (
    FACTORS,
    Factor,
    FusedTask,
    fused_cross_entropy,
)
from deepspeed_autotp.vocab_parallel.head_product import HeadProduct

_GONE = (
    "these logits are used for the first time after the backward pass, which has overwritten them "
    "with their gradient, or after a change of the weights or hidden states; before "
    "loss.backward(), take what you need of them, such as outputs.logits.argmax(-1), or "
    "outputs.logits.full(); or set tensor_parallel.vocab_parallel_lm_head to false"
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
    ``is_over``: the backward pass of a fused loss has run, after which weights may change.
    """

    is_running: bool = True
    has_loss: bool = False
    in_function: bool = False
    is_over: bool = False

    def end(self) -> None:
        """The backward pass of a fused loss runs."""
        self.is_over = True

    def refuse_function(self) -> None:
        """RuntimeError within an autograd.Function that is not around the whole forward."""
        if in_autograd_function() != self.in_function:
            raise RuntimeError(_FUNCTION)


class LazyLogits:
    """The logits [..., V], of which this rank has the shard [..., V/R], or what it is a product of.

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
        shard: Tensor | HeadProduct,
        layout: ShardLayout,
        group: TPGroup,
        *,
        step: Step | None = None,
        taken: tuple[Factor, ...] = (),
    ) -> None:
        self._shard, self._layout, self._group = shard, layout, group
        self._step = Step(is_running=False) if step is None else step
        self._taken = taken
        is_cast = any(function is Tensor.float for function, _ in taken)
        dtype = torch.float32 if is_cast else shard.dtype
        shape = (*shard.shape[:-1], layout.size)
        self._empty = torch.empty(shape, dtype=dtype, device="meta")  # which says what it knows
        self._version = _version(shard)
        self._full: Tensor | None = None

    def loss(
        self, labels: Tensor, ignore_index: int, count: Tensor | float, *, columns: int
    ) -> Tensor | None:
        """The sum of the cross-entropy of each token over ``count``, formed from the shards; None
        where it takes the full logits: they were gathered, and maybe written to, there are not as
        many ``columns``, or the gradient of another loss will be written over the shard."""
        self._step.refuse_function()
        step = self._step
        if self._full is not None or columns != self._layout.size:
            return None
        if step.has_loss or not step.is_running:
            return None
        if _version(self._shard) != self._version:
            raise RuntimeError(_GONE)
        step.has_loss = torch.is_grad_enabled()  # or nothing is written over the shard
        before, cap = _split(self._taken)
        # The loss computes in float32 anyhow.
        narrow, wide = self._shard.dtype, self._empty.dtype
        is_exact = narrow == wide or narrow.itemsize < wide.itemsize
        is_fused = is_exact and all(function in FACTORS for function, _ in before)
        if is_fused and isinstance(self._shard, HeadProduct):
            own = loss_task(self._layout, self._group, ignore_index=ignore_index, soft_cap=cap)
            task = FusedTask(own, before, step.end)
            return fused_cross_entropy(self._shard, labels, count, task).float()
        return self._loss_of_shard(labels, ignore_index, cap, is_exact).sum().float() / count

    def _loss_of_shard(
        self, labels: Tensor, ignore_index: int, cap: float, is_exact: bool
    ) -> Tensor:
        """The cross-entropy of each token, whose gradient is written over the shard."""
        shard = self._form()
        functions = [function for function, _ in self._taken if function is not Tensor.float]
        is_capped = cap > 0 and len(functions) == len(_SOFT_CAP)
        if functions and not is_capped or not is_exact:
            with torch.set_grad_enabled(shard.requires_grad):
                for function, numbers in self._taken:
                    shard = function(shard, *numbers)
            self._shard, self._version, self._taken = shard, version_counter(shard), ()
        return vocabulary_cross_entropy(
            shard.reshape(labels.numel(), shard.shape[-1]),
            labels,
            layout=self._layout,
            group=self._group,
            ignore_index=ignore_index,
            overwrite=is_capped or functions[-1:] != [Tensor.tanh],  # which reads its result
            soft_cap=cap if self._taken and is_capped else 0.0,
        )

    def _is_gone(self) -> bool:
        """Whether the shard was not formed in time."""
        shard = self._shard
        return isinstance(shard, HeadProduct) and (self._step.is_over or shard.is_gone)

    def _form(self) -> Tensor:
        """The shard, formed now where it is a product."""
        if isinstance(self._shard, HeadProduct):
            self._shard = self._shard.formed()
            self._version = version_counter(self._shard)
        return self._shard

    def result(self) -> LazyLogits | Tensor:
        """As the model returns them: full ones of which the loss was formed are a tensor."""
        return self if self._full is None or self._step.has_loss else self._full

    def full(self) -> Tensor:
        """The full logits, gathered at the first call. Every rank calls it."""
        self._step.refuse_function()
        if self._full is None:
            if _version(self._shard) != self._version or self._is_gone():
                raise RuntimeError(_GONE)
            shard = self._form()
            # A use without gradients may come before one with gradients, and one in a checkpoint,
            # which runs again and does not gather again, before others. A hook that keeps the
            # result of tanh itself would make a cycle with its node, which nothing frees.
            own = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda x: x)
            with torch.inference_mode(False), torch.enable_grad(), own:
                full = gather_from_tp_region(shard, self._layout, self._group)
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


def _version(shard: Tensor | HeadProduct) -> int:
    return shard.version if isinstance(shard, HeadProduct) else version_counter(shard)


def _split(taken: tuple[Factor, ...]) -> tuple[tuple[Factor, ...], float]:
    """What is done before a soft cap that comes last, and the cap, 0 for none; casts alone, which
    a loss does not need, are nothing."""
    computed = [i for i, (function, _) in enumerate(taken) if function is not Tensor.float]
    last, cap = computed[-3:], 0.0
    if tuple(taken[i][0] for i in last) == _SOFT_CAP:
        first, third = taken[last[0]][1][0], taken[last[2]][1][0]
        if first == third and first > 0:
            cap, computed = first, computed[:-3]
    return taken[: computed[-1] + 1] if computed else (), cap


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
