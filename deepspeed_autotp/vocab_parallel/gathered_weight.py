# SPDX-License-Identifier: Apache-2.0
"""Weights that are used past their layer's forward.

A loss that never makes the logits multiplies by ``lm_head.weight`` itself, as TRL's trainers do.
A layer that gives its whole output has a whole weight for them: what the forward of the model,
outside of the layer's own, reads as ``weight`` or ``bias`` is gathered where its numbers are used.
What is trained stays the part of a rank. Elsewhere, as for an optimizer or a user who looks at
it, the part is what is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from deepspeed_autotp import interop
from deepspeed_autotp.distributed.mappings import Parts, gather_parts, own_share
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.layers.linear import Sharding
from deepspeed_autotp.vocab_parallel import logits_rules as rules

_ABOUT = rules.ABOUT - {Tensor.detach, torch.detach}


class PromisedWeight(Tensor):
    """A whole weight or bias of which this rank holds a part; there is no memory behind it.

    Shape, data type and device cost nothing, as models ask for them to cast what they multiply.
    Whatever is done with the numbers gathers them first, which every rank does.
    """

    _gather: Callable[[], Tensor]
    _whole: Tensor | None

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        # Printing on one rank must not wait for the others, so there are no numbers here.
        return f"PromisedWeight({list(self.shape)}, {self.dtype}; whole when used)"

    def whole(self) -> Tensor:
        """The whole tensor, gathered at the first call. Every rank calls it."""
        if self._whole is None:
            with torch.enable_grad():
                self._whole = self._gather()
        return self._whole

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ABOUT:
                return func(*args, **(kwargs or {}))
        return _on_whole(cls.whole, func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What arrives below autograd, from calls that are not Python's."""
        return _on_whole(lambda x: x.whole().detach(), func, args, kwargs)


def _on_whole(
    whole: Callable[[PromisedWeight], Tensor],
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> Any:
    args, named = tree_map_only(PromisedWeight, whole, (tuple(args), dict(kwargs or {})))
    return func(*args, **named)


class _Promise(torch.autograd.Function):
    """A promise of the whole weight; the gradient is the own part of the whole one."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, parts: Parts, group: TPGroup, dim: int) -> Tensor:
        ctx.parts, ctx.group, ctx.dim = parts, group, dim
        shape = list(part.shape)
        shape[dim] = parts.size
        made: Tensor = PromisedWeight._make_wrapper_subclass(
            PromisedWeight, shape, dtype=part.dtype, device=part.device
        )
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor, None, None, None]:
        return own_share(dw, ctx.parts, ctx.group.rank, ctx.dim), None, None, None


def promised(part: Tensor, parts: Parts, group: TPGroup, *, dim: int) -> PromisedWeight:
    """The whole tensor of a rank's ``part``, which is cut along ``dim``."""
    made: PromisedWeight = _Promise.apply(part, parts, group, dim)  # type: ignore[no-untyped-call]
    made._gather = functools.partial(gather_parts, part, parts, group, dim=dim)
    made._whole = None
    interop.stand_in(made, part)
    return made


class Reading:
    """Whether the forward of the model runs, in which every rank reads the same weights.

    A checkpointed part of it runs again in the backward. Within one forward a weight is gathered
    once, however often it is read.
    """

    def __init__(self) -> None:
        self._depth = 0  # of calls of the model within its own forward
        self._promised: dict[tuple[nn.Module, str, bool], PromisedWeight] = {}

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """Hooks on ``model`` by which this is known."""
        return [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, model: nn.Module, args: object) -> None:
        self._depth += 1

    def _end(self, model: nn.Module, args: object, output: object) -> None:
        # Called also where a hook before ours has failed, and ours was not reached.
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self._promised.clear()

    def read(self, layer: nn.Module, key: str) -> Tensor | None:
        """The parameter ``key`` of a layer, whole for whoever computes and is not the layer."""
        if key not in layer._parameters:
            raise AttributeError(key)  # after which nn.Module says what it is that has none
        part = layer._parameters[key]
        if part is None or vars(layer)["tp_own"] or not self._computes():
            return part
        try:
            return self._whole(layer, key, part)
        except AttributeError as error:
            # Python would take it for a missing attribute, and ask nn.Module, which has the part.
            raise RuntimeError(f"{key} of {layer} cannot be made whole: {error}") from error

    def _computes(self) -> bool:
        if self._depth > 0 or torch.compiler.is_compiling():
            return self._depth > 0
        return torch._C._current_graph_task_id() >= 0  # a checkpoint that runs again

    def _whole(self, layer: nn.Module, key: str, part: Tensor) -> Tensor:
        own: Sharding = vars(layer)["sharding"]
        dim = 0 if isinstance(layer, nn.Linear) else -1
        if torch.compiler.is_compiling():
            return gather_parts(part, own.parts, own.group, dim=dim)
        if self._depth == 0:
            return promised(part, own.parts, own.group, dim=dim)
        asked = layer, key, torch.is_grad_enabled()
        if asked not in self._promised:
            self._promised[asked] = promised(part, own.parts, own.group, dim=dim)
        return self._promised[asked]


class WholeWeight(nn.Module):
    """A column layer that gives its whole output, mixed into its class."""

    tp_reading: Reading
    tp_own: bool

    def forward(self, x: Tensor) -> Tensor:
        vars(self)["tp_own"] = True
        try:
            y: Tensor = super().forward(x)
        finally:
            vars(self)["tp_own"] = False
        return y

    @property
    def weight(self) -> Tensor | None:
        """[O, I] in the model's forward outside of the layer's own, else this rank's [O/R, I]."""
        return self.tp_reading.read(self, "weight")

    @property
    def bias(self) -> Tensor | None:
        """[O] or [O/R], as ``weight``."""
        return self.tp_reading.read(self, "bias")
