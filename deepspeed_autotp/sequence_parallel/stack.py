# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism: between blocks every rank holds its part of the tokens.

A stack is a list of layers, its stages. The first stage takes the tokens of this rank out of a
whole activation, and the last one gives a whole activation back, so that masks, positions, caches
and the output head, which are made outside, see all tokens. Norms, residuals and dropouts of a
stage work on a part. Attention and feed-forward networks are given all tokens where they begin,
at their inlet, since attention makes its views by the size of its input. They end in a row layer,
the outlet, which sums over the ranks for each rank's tokens alone. What stays whole, or sums in a
way of its own as experts do, is an island: given all tokens, which are cut again behind it.

N tokens, R ranks, n = N/R    embedding  [N, H]
                              first      [n, H]   take_tokens
                              norm       [n, H]
                              inlet      [N, H]   gather_tokens
                              outlet     [n, H]   sum_tokens
                              last       [N, H]   gather_tokens

forward   an all-gather at each inlet, a reduce-scatter at each outlet
backward  a reduce-scatter at each inlet, an all-gather at each outlet

Without gradients, as in generation, all ranks hold all tokens. That is decided once for a call of
the stack, because the gradient of a norm is summed over the ranks if it is cut.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepspeed_autotp import interop
from deepspeed_autotp.distributed.mappings import sum_over_ranks
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.sequence_mappings import (
    Gathered,
    Tokens,
    gather_tokens,
    sum_tokens,
    take_tokens,
)
from deepspeed_autotp.layers.grad_overlap import SharedInput


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An output with its tensor changed, the first one where there are several."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


@dataclass(frozen=True, slots=True)
class Argument:
    """The first argument of a forward, which ``name`` is where it is given by name.

    Of some forwards a decorator hides the names: it is the first tensor then.
    """

    name: str

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Its value."""
        return cast(Tensor, args[0] if args else kwargs[self._key(kwargs)])

    def replaced(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Tensor
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments with another value in its place."""
        if args:
            return (value, *args[1:]), kwargs
        return args, {**kwargs, self._key(kwargs): value}

    def _key(self, kwargs: Mapping[str, Any]) -> str:
        tensors = (key for key, value in kwargs.items() if isinstance(value, Tensor))
        return self.name if self.name in kwargs else next(tensors, self.name)


@dataclass(frozen=True, slots=True)
class Stage:
    """One layer of a stack."""

    name: str
    given: Argument
    is_first: bool
    is_last: bool


def _refuse_hidden_states(module: nn.Module, args: object, kwargs: Mapping[str, Any]) -> None:
    if torch.is_grad_enabled() and interop.wants_hidden_states(module, kwargs):
        raise ValueError(
            "output_hidden_states with tensor_parallel.sequence_parallel: between the layers a "
            "rank has its part of the tokens only, so there are no whole hidden states in "
            "training; leave one of the two out, or call the model under torch.no_grad()"
        )


class Stack:
    """The stages below ``owner``, and how the tokens lie on the ranks in what runs now."""

    def __init__(self, owner: str, *, group: TPGroup, input: SharedInput) -> None:
        self.group = group
        self._owner = owner or "the model"
        self._input = input
        self._is_cutting = False
        # Of the stages that have run in this call, and of the one that runs.
        self._between: Tokens | None = None
        self._within: Tokens | None = None
        self._training = False
        # Activation checkpointing calls a stage again, long after its owner has returned and maybe
        # run with other tokens: with a tensor over the same memory, which it keeps alive.
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, Tokens] = (
            weakref.WeakKeyDictionary()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        """One in which nothing runs, for the copy of a model."""
        made = Stack(self._owner, group=self.group, input=copy.deepcopy(self._input, memo))
        memo[id(self)] = made
        return made

    def watch(self, owner: nn.Module, *, around: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Hooks that begin and end a call of the stack, and look at calls of what lies around."""
        asked = [
            module.register_forward_pre_hook(_refuse_hidden_states, with_kwargs=True)
            for module in (*around, owner)
        ]
        return [
            *asked,
            owner.register_forward_pre_hook(self._begin),
            owner.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, owner: nn.Module, args: object) -> None:
        self._between, self._is_cutting = None, torch.is_grad_enabled()

    def _end(self, owner: nn.Module, args: object, output: object) -> None:
        left, self._between, self._is_cutting = self._between, None, False
        if left is not None and output is not None:
            raise RuntimeError(
                f"the last layer of {self._owner} did not run, so its output is this rank's tokens "
                "only; leave out tensor_parallel.sequence_parallel where layers are skipped"
            )

    def tokens_of(self, x: Tensor, stage: Stage) -> Tokens | None:
        """Of ``x``, which ``stage`` is given; None where all ranks hold all of it."""
        if not self._is_cutting:
            known = self._known.get(x.untyped_storage())
            if torch.is_grad_enabled() and known is None:
                raise RuntimeError(self._outside(stage.name))
            if not torch.is_grad_enabled():
                return None
            # Whole activations of two calls may lie in one memory; the stage begins with all of x.
            return Tokens.of(x, self.group.size) if stage.is_first else known
        if stage.is_first:
            self._between = Tokens.of(x, self.group.size)
        tokens = self._between
        if tokens is None or not (stage.is_first or tokens.is_own(x, self.group.rank)):
            raise RuntimeError(
                f"{stage.name} was given {list(x.shape)}, which is not the part of the tokens that "
                f"this rank has; leave out tensor_parallel.sequence_parallel where layers of "
                f"{self._owner} are skipped, or given whole activations"
            )
        self._known[x.untyped_storage()] = tokens
        return tokens

    @property
    def is_idle(self) -> bool:
        """Whether all ranks hold all tokens of whatever runs."""
        return not (self._is_cutting or torch.is_grad_enabled())

    def run(
        self,
        stage: Stage,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        training: bool,
    ) -> Any:
        """``forward`` of a stage with its arguments."""
        x = stage.given.of(args, kwargs)
        tokens = self.tokens_of(x, stage)
        if tokens is None:
            return forward(*args, **kwargs)
        if stage.is_first:
            own = take_tokens(x, tokens, self.group)
            args, kwargs = stage.given.replaced(args, kwargs, own)
        before = self._within, self._training
        self._within, self._training = tokens, training
        self._part(x.device)
        try:
            output = forward(*args, **kwargs)
        finally:
            self._all(x.device)
            self._within, self._training = before
            self._input.forget()
        if not stage.is_last:
            return output
        self._between = None
        return _with_first(output, lambda y: gather_tokens(y, tokens, self.group))

    def enter(self, x: Tensor, name: str) -> Tensor:
        """All tokens, at an inlet."""
        tokens = self._tokens_here(name)
        if tokens is None:
            return x
        self._all(x.device)
        whole = gather_tokens(x, tokens, self.group)
        self._input.gathered(Gathered(x, whole, whole._version, tokens))
        return whole

    def whole(
        self,
        name: str,
        given: Argument,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """``forward`` of an island with its arguments."""
        tokens = self._tokens_here(name)
        if tokens is None:
            return forward(*args, **kwargs)
        x = given.of(args, kwargs)
        args, kwargs = given.replaced(args, kwargs, self.enter(x, name))
        output = forward(*args, **kwargs)
        self._part(x.device)
        return _with_first(output, lambda y: take_tokens(y, tokens, self.group))

    def total(self, y: Tensor, group: TPGroup, name: str) -> Tensor:
        """The sum over the ranks, at an outlet."""
        tokens = self._tokens_here(name)
        if tokens is None:
            return sum_over_ranks(y, group)
        own = sum_tokens(y, tokens, group)
        self._part(y.device)
        return own

    def _tokens_here(self, name: str) -> Tokens | None:
        if self._within is None and torch.is_grad_enabled() and not self._is_cutting:
            raise RuntimeError(self._outside(name))
        return self._within

    def _outside(self, name: str) -> str:
        return (
            f"{name} was called with gradients, but not by {self._owner}, so it is not known which "
            "of the tokens this rank has; with tensor_parallel.sequence_parallel call the model "
            "as a whole, and checkpoint whole layers, their inputs left where they are"
        )

    # Ranks draw other random numbers for their part of the tokens, and the same ones for all.

    def _part(self, device: torch.device) -> None:
        if self._training:
            self.group.fork.enter(device)

    def _all(self, device: torch.device) -> None:
        if self._training:
            self.group.fork.leave(device)
