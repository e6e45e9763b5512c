# SPDX-License-Identifier: Apache-2.0
"""Hidden states between the layers of a model, where it was asked to return them.

A model records what a layer is given or gives, and returns it. In training that is this rank's
shard of the tokens; it becomes the full activation when the module that was asked returns. Without
``output_hidden_states``, an argument or a key of the configuration, nothing is kept or gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.sequence_collectives import (
    SequenceLayout,
    gather_from_sequence_region,
)
from deepspeed_autotp.interop.torch_private import with_leaves
from deepspeed_autotp.interop.transformers import hidden_states_argument, wants_hidden_states


class HiddenStates:
    """What the layers of a model's stacks are given and give, in a call that asks for it."""

    def __init__(self, group: TPGroup) -> None:
        self._group = group
        self._asked: str | None = None  # the name of the outermost module that was asked
        self._shards: list[tuple[Tensor, SequenceLayout]] = []
        self._full: list[Tensor] = []
        self._gathered: list[tuple[Tensor, Tensor]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> HiddenStates:
        """One that was not asked, for the copy of a model."""
        made = memo[id(self)] = HiddenStates(self._group)
        return made

    def register_hooks(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        """Hooks of a module that holds a stack, and may be asked."""
        place = _Place(self, name, hidden_states_argument(module))
        return [
            module.register_forward_pre_hook(place.begin, with_kwargs=True),
            # Other hooks are given what a user is.
            module.register_forward_hook(place.end, always_call=True, prepend=True),
        ]

    def begin(self, name: str, *, is_asked: bool) -> None:
        """A module is called."""
        if self._asked is not None and not _is_inside(name, self._asked):
            self._forget()  # a call that KeyboardInterrupt has ended has not told
        if is_asked and self._asked is None:
            self._asked = name

    def end(self, name: str) -> None:
        """It has returned."""
        if self._asked == name:
            self._forget()

    @property
    def is_asked(self) -> bool:
        """Whether layers have to :meth:`add`."""
        return self._asked is not None

    def add(self, x: Tensor, layout: SequenceLayout | None) -> None:
        """``x`` is this rank's shard, or, without ``layout``, a full activation."""
        if layout is None:
            self._full.append(x)
        else:
            self._shards.append((x, layout))

    def in_full(self, output: Any) -> Any:
        """``output`` of a module with full activations in the place of shards."""
        return with_leaves(Tensor, self._in_full, output)

    def _in_full(self, x: Tensor) -> Tensor:
        for known in self._full:
            if known is x:
                return x
        for shard, full in self._gathered:
            if shard is x:
                return full
        for shard, layout in self._shards:
            if shard is x:
                full = gather_from_sequence_region(x, layout, self._group)
                self._gathered.append((x, full))
                self._full.append(full)
                return full
        for shard, layout in self._shards:
            if _is_like(x, shard, layout):
                raise ValueError(
                    "output_hidden_states with tensor_parallel.sequence_parallel: the model "
                    f"returns a tensor of shape {list(x.shape)} that no layer was given or gave, "
                    "and that is made of what is between its layers, where in training a rank has "
                    "some tokens only; set one of the two to false, or call the model under "
                    "torch.no_grad()"
                )
        return x

    def _forget(self) -> None:
        self._asked, self._shards, self._full, self._gathered = None, [], [], []


@dataclass(frozen=True, slots=True)
class _Place:
    """The hooks of one module; ``position`` is that of the argument ``output_hidden_states``."""

    states: HiddenStates
    name: str
    position: int | None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            asked = wants_hidden_states(module, args, kwargs, self.position)
            self.states.begin(self.name, is_asked=asked)

    def end(self, module: nn.Module, args: object, output: Any) -> Any:
        try:
            is_asked = self.states.is_asked and output is not None
            return self.states.in_full(output) if is_asked else None
        finally:
            self.states.end(self.name)


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and name.startswith(f"{outer}." if outer else "")


def _is_like(x: Tensor, shard: Tensor, layout: SequenceLayout) -> bool:
    """Whether ``x`` may be made of a shard."""
    return x.dim() == shard.dim() and x.shape[-1] == shard.shape[-1] and layout.is_shard(x)
