# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism: between blocks every rank has its shard of the tokens.

A stack is a list of layers. The first one takes this rank's tokens out of a full activation, and
the last one gives a full activation back, so that masks, positions, caches and the output head,
which are made outside, see all tokens. Norms, residuals and dropouts of a layer work on a shard.
Attention and feed-forward networks gather all tokens at their input, since attention reshapes by
the size of its input. They end in a row layer, which sums over the ranks for each rank's tokens
only. What is replicated, or sums in a way of its own as experts do, gathers all tokens at its input
and scatters its output.

N tokens, R ranks, n = N/R    embedding                   [N, H]
                              first layer                 [n, H]   scatter_to_sequence_region
                              norm                        [n, H]
                              attention or feed-forward   [N, H]   gather_from_sequence_region
                              its row layer               [n, H]   reduce_scatter_to_sequence_region
                              last layer                  [N, H]   gather_from_sequence_region
                              or, before an output head that takes own tokens:
                              last layer, final norm      [n, H]   gather_later

forward   an all-gather at the input of each, a reduce-scatter at each row layer
backward  a reduce-scatter at the input of each, an all-gather at each row layer

Without gradients, as in generation, all ranks have all tokens. That is decided once for a call of
the stack, because the gradient of a norm is summed over the ranks where tokens are sharded.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepspeed_autotp.distributed.autograd_collectives import reduce_from_tp_region
from deepspeed_autotp.distributed.lazy_sequence import gather_later
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.sequence_collectives import (
    GatheredSequence,
    SequenceLayout,
    gather_from_sequence_region,
    reduce_scatter_to_sequence_region,
    scatter_to_sequence_region,
)
from deepspeed_autotp.layers.forward_context import ForwardContext
from deepspeed_autotp.sequence_parallel.hidden_states import HiddenStates


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An output with its tensor changed, the first one where there are several."""
    if isinstance(output, list):
        return [change(output[0]), *output[1:]]
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _first(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


@dataclass(frozen=True, slots=True)
class FirstArgument:
    """The first argument of a forward, ``name`` where it is given by keyword.

    Where a decorator hides the names of a forward, it is the first tensor.
    """

    name: str

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Its value."""
        return cast(Tensor, args[0] if args else kwargs[self._key(kwargs)])

    def replaced(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Tensor
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments with another value in its place, and wherever the same tensor is given."""
        x = self.of(args, kwargs)

        def other(given: Any) -> Any:
            return value if given is x else given

        return tuple(map(other, args)), {key: other(given) for key, given in kwargs.items()}

    def _key(self, kwargs: Mapping[str, Any]) -> str:
        tensors = (key for key, value in kwargs.items() if isinstance(value, Tensor))
        return self.name if self.name in kwargs else next(tensors, self.name)


@dataclass(frozen=True, slots=True)
class StackLayer:
    """One layer of a stack."""

    name: str
    argument: FirstArgument
    is_first: bool
    is_last: bool
    # Other arguments that have a value for each token; names and places.
    token_arguments: Mapping[str, int]
    streams_first: bool

    def tokens_first(self, x: Tensor) -> Tensor:
        """Hidden states as ``[batch, sequence, ...]``."""
        return x.movedim(0, -2) if self.streams_first else x

    def streams_back(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x.movedim(-2, 0).contiguous() if self.streams_first else x

    def refuse_hidden_streams(self) -> None:
        """ValueError where hidden states have streams before their tokens."""
        if self.streams_first:
            raise ValueError(
                "output_hidden_states with tensor_parallel.sequence_parallel: the layers of this "
                f"model, such as {self.name}, are given several streams, of which a rank has some "
                "tokens only; set one of the two to false, or call the model under torch.no_grad()"
            )

    def with_token_arguments(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[Tensor], Tensor]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments, those with a value for each token changed."""
        places = self.token_arguments.values()
        return (
            tuple(change(v) if i in places and v is not None else v for i, v in enumerate(args)),
            {
                key: change(v) if key in self.token_arguments and v is not None else v
                for key, v in kwargs.items()
            },
        )


class Stack:
    """The layers below ``owner``, and how the tokens are sharded in the call that runs."""

    def __init__(
        self,
        owner: str,
        *,
        group: TPGroup,
        context: ForwardContext,
        hidden: HiddenStates,
        may_end_later: bool = False,
    ) -> None:
        self.group = group
        # Whether the norms behind the layers lead to the output head.
        self._may_end_later = may_end_later
        self._hidden = hidden
        self._context = context
        self._owner = owner or "the model"
        self._is_sharding = False
        # Of the layers that have run in this call, and of the one that runs.
        self._between: SequenceLayout | None = None
        self._within: SequenceLayout | None = None
        # Activation checkpointing calls a layer again, long after its owner has returned and maybe
        # run with other tokens: with a tensor over the same storage, which it keeps alive.
        self._by_storage: weakref.WeakKeyDictionary[torch.UntypedStorage, SequenceLayout] = (
            weakref.WeakKeyDictionary()
        )
        # Whether this call leaves the gather of its output to those who use it, and what the last
        # layers of such calls were given.
        self._ends_later = False
        self._gathered_later: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        """One in which nothing runs, for the copy of a model."""
        context, hidden = copy.deepcopy((self._context, self._hidden), memo)
        made = Stack(
            self._owner,
            group=self.group,
            context=context,
            hidden=hidden,
            may_end_later=self._may_end_later,
        )
        memo[id(self)] = made
        return made

    def register_hooks(self, owner: nn.Module) -> list[RemovableHandle]:
        """Hooks that begin and end a call of the stack."""
        return [
            owner.register_forward_pre_hook(self._begin),
            owner.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, owner: nn.Module, args: object) -> None:
        self._between, self._is_sharding = None, torch.is_grad_enabled()
        head = self._context.head
        is_awaited = head is not None and head.is_outside_checkpoint()
        self._ends_later = self._may_end_later and is_awaited

    def _end(self, owner: nn.Module, args: object, output: object) -> None:
        layout, self._between, self._is_sharding = self._between, None, False
        if layout is not None and output is not None:
            raise RuntimeError(
                f"the last layer of {self._owner} did not run, so its output has this rank's "
                "tokens only; set tensor_parallel.sequence_parallel to false where layers are "
                "skipped"
            )

    def layout_of(self, x: Tensor, layer: StackLayer) -> SequenceLayout | None:
        """Of ``x``, the input of ``layer``; None where all ranks have all tokens."""
        if not self._is_sharding:
            return self._recomputed_layout(x, layer) if torch.is_grad_enabled() else None
        if layer.is_first:
            self._between = SequenceLayout.of(x, self.group.size)
        layout = self._between
        if layout is None or not (layer.is_first or layout.is_shard(x)):
            raise RuntimeError(
                f"{layer.name} was given an input of shape {list(x.shape)}, expected this rank's "
                "shard of the tokens; set tensor_parallel.sequence_parallel to false where layers "
                f"of {self._owner} are skipped, or given full activations"
            )
        if not torch.compiler.is_compiling():
            self._by_storage[x.untyped_storage()] = layout
        return layout

    def _recomputed_layout(self, x: Tensor, layer: StackLayer) -> SequenceLayout:
        """Of ``x`` where a checkpoint runs a layer again."""
        known = None if torch.compiler.is_compiling() else self._by_storage.get(x.untyped_storage())
        if known is None:
            raise RuntimeError(self._called_from_outside(layer.name))
        # Full activations of two calls may be in one storage; the first layer has all of x.
        return SequenceLayout.of(x, self.group.size) if layer.is_first else known

    @property
    def is_idle(self) -> bool:
        """Whether all ranks have all tokens in whatever runs."""
        return not (self._is_sharding or torch.is_grad_enabled())

    @property
    def draws(self) -> bool:
        """Whether ranks draw random numbers of their own."""
        return self._context.rng.is_active

    def run(
        self,
        layer: StackLayer,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """``forward`` of a layer with its arguments."""
        x = layer.argument.of(args, kwargs)
        layout = self.layout_of(layer.tokens_first(x), layer)
        if layout is None:
            return forward(*args, **kwargs)
        args, kwargs = layer.with_token_arguments(
            args, kwargs, lambda each: self._scattered(each, layout, layer)
        )
        if layer.is_first:
            local = scatter_to_sequence_region(layer.tokens_first(x), layout, self.group)
            args, kwargs = layer.argument.replaced(args, kwargs, layer.streams_back(local))
        before, self._within = self._within, layout
        self._enter_rng_region(x.device)
        try:
            output = forward(*args, **kwargs)
        finally:
            self._leave_rng_region()
            self._within = before
            self._context.input.forget()
        if layer.is_last:
            self._between = None
            gather = gather_later if self._gathers_later(x, layer) else gather_from_sequence_region

            def gathered(y: Tensor) -> Tensor:
                return layer.streams_back(gather(layer.tokens_first(y), layout, self.group))

            output = _with_first(output, gathered)
        if self._hidden.is_asked:
            layer.refuse_hidden_streams()
            self._hidden.add(x, None if layer.is_first else layout)
            self._hidden.add(_first(output), None if layer.is_last else layout)
        return output

    def _gathers_later(self, x: Tensor, layer: StackLayer) -> bool:
        """Whether the last layer, given ``x``, leaves the gather to those who use its output; as in
        the forward where a checkpoint runs it again."""
        if torch.compiler.is_compiling():
            return False
        storage = x.untyped_storage()
        if not self._is_sharding:
            return storage in self._gathered_later
        # A re-entrant checkpoint, which has no graph in here, gives its result one of its own.
        is_plain = torch.is_grad_enabled() and not layer.streams_first
        if self._ends_later and is_plain and not self._hidden.is_asked:
            self._gathered_later.add(storage)
            return True
        self._gathered_later.discard(storage)
        return False

    def _scattered(self, x: Tensor, layout: SequenceLayout, layer: StackLayer) -> Tensor:
        """This rank's tokens of another argument of ``layer``."""
        if tuple(x.shape[: len(layout.shape)]) != layout.shape:
            raise RuntimeError(
                f"{layer.name} was given an argument of shape {list(x.shape)}, expected all tokens "
                f"{list(layout.shape)}; set tensor_parallel.sequence_parallel to false"
            )
        return scatter_to_sequence_region(x, layout, self.group)

    def gather_input(self, x: Tensor, name: str) -> Tensor:
        """All tokens, at the input of attention or a feed-forward network."""
        layout = self._layout_within(name)
        if layout is None:
            return x
        self._leave_rng_region()
        full = gather_from_sequence_region(x, layout, self.group)
        gathered = GatheredSequence.of(x, full, layout)
        self._context.input.set_gathered(gathered)
        return gathered.full

    def run_on_all_tokens(
        self,
        name: str,
        argument: FirstArgument,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """``forward`` of a module between a gather of its input and a scatter of its output."""
        layout = self._layout_within(name)
        if layout is None:
            return forward(*args, **kwargs)
        x = argument.of(args, kwargs)
        args, kwargs = argument.replaced(args, kwargs, self.gather_input(x, name))
        output = forward(*args, **kwargs)
        self._enter_rng_region(x.device)
        return _with_first(output, lambda y: scatter_to_sequence_region(y, layout, self.group))

    def reduce_output(self, y: Tensor, group: TPGroup, name: str) -> Tensor:
        """The sum over the ranks, at a row layer."""
        layout = self._layout_within(name)
        if layout is None:
            return reduce_from_tp_region(y, group)
        local = reduce_scatter_to_sequence_region(y, layout, group)
        self._enter_rng_region(y.device)
        return local

    def _layout_within(self, name: str) -> SequenceLayout | None:
        if self._within is None and torch.is_grad_enabled() and not self._is_sharding:
            raise RuntimeError(self._called_from_outside(name))
        return self._within

    def _called_from_outside(self, name: str) -> str:
        return (
            f"{name} was called with gradients, but not by {self._owner}, so the layout of its "
            "tokens is not known; with tensor_parallel.sequence_parallel call the full model, "
            "checkpoint full layers, without offloading their inputs, and compile afterwards"
        )

    # Ranks draw different random numbers for their shard of the tokens, and equal ones for all.

    def _enter_rng_region(self, device: torch.device) -> None:
        if self._context.rng.is_active:
            self._context.rng.enter(device, of_tokens=True)

    def _leave_rng_region(self) -> None:
        if self._context.rng.is_active:
            self._context.rng.leave()
