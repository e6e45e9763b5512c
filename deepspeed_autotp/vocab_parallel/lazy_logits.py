# SPDX-License-Identifier: Apache-2.0
"""``outputs.logits`` of a step whose loss is formed from shards: gathered when they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed_autotp.distributed.autograd_collectives import ShardLayout, gather_from_tp_region
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.torch_private import in_autograd_function, with_leaves

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


class LazyLogits:
    """The logits [..., V], of which this rank has the shard [..., V/R].

    Not a tensor, so that what traverses outputs for tensors passes them by. Any function of torch,
    and any attribute or operator of a tensor but those of its shape, gathers the full logits: every
    rank does that or none, and for the first time before the backward. Gradients flow from them to
    the shards. They do not include that of the loss, so to ask for theirs is an error.
    """

    __slots__ = ("_dtype", "_full", "_group", "_layout", "_overwritten", "_shard", "_soft_cap")
    __hash__ = object.__hash__

    def __init__(
        self,
        shard: Tensor,
        layout: ShardLayout,
        group: TPGroup,
        *,
        dtype: torch.dtype | None = None,
        soft_cap: float = 0.0,
    ) -> None:
        self._shard, self._layout, self._group, self._soft_cap = shard, layout, group, soft_cap
        self._dtype = dtype or shard.dtype
        self._full: Tensor | None = None
        self._overwritten = False

    def overwrite(self) -> bool:
        """True, and the memory of the shard has something else from now on."""
        self._overwritten = True
        return True

    def full(self) -> Tensor:
        """The full logits, gathered at the first call. Every rank calls it."""
        if in_autograd_function():
            raise RuntimeError(_FUNCTION)
        if self._full is None:
            if self._overwritten:
                raise RuntimeError(_OVERWRITTEN)
            # A use without gradients may come before one with gradients, and one in a checkpoint,
            # which runs again and does not gather again, before others. A hook that keeps the
            # result of tanh itself would make a cycle with its node, which nothing frees.
            own = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda x: x)
            with torch.inference_mode(False), torch.enable_grad(), own:
                full = gather_from_tp_region(self._shard, self._layout, self._group)
                full, cap = full.to(self._dtype), self._soft_cap
                self._full = torch.tanh(full / cap) * cap if cap else full
        return self._full

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._shard.shape[:-1], self._layout.size))

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._shard.device

    @property
    def ndim(self) -> int:
        return self._shard.ndim

    @property
    def requires_grad(self) -> bool:
        return self._shard.requires_grad

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        # Without values: printing on one rank must not wait for the others.
        return f"LazyLogits({list(self.shape)}, {self.dtype}; gathered when used)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.full().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.full().__deepcopy__(memo)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_GRADIENT:
            raise RuntimeError(_GRADIENT.format(name))
        if name not in _NAMES:
            raise AttributeError(f"logits have no attribute {name!r}")
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
        args, named = with_leaves(LazyLogits, LazyLogits.full, (tuple(args), dict(kwargs or {})))
        return func(*args, **named)


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: LazyLogits, *args: Any) -> Any:
        operator = self.full().__getattribute__(name)
        return operator(*(a.full() if isinstance(a, LazyLogits) else a for a in args))

    return apply


for _each in _OPERATORS:
    setattr(LazyLogits, f"__{_each}__", _operator(f"__{_each}__"))
