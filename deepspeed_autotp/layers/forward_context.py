# SPDX-License-Identifier: Apache-2.0
"""What the layers of one sharded model share while its forward runs."""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepspeed_autotp.distributed.dropout_rng import DropoutRNG
from deepspeed_autotp.interop.peft import without_adapters
from deepspeed_autotp.interop.torch_private import is_called, saves_tensors_by
from deepspeed_autotp.layers.grad_overlap import SharedInput


@dataclass(frozen=True, slots=True)
class HeadOfOwnTokens:
    """``packs``: what packed the tensors that autograd saves where the forward of the head's model
    began; a checkpoint packs them otherwise."""

    packs: object

    def is_outside_checkpoint(self) -> bool:
        """Whether no checkpoint has begun since, which would run again without the head."""
        return saves_tensors_by() is self.packs


class ForwardContext:
    """Entered around the forward of the model, and left also when it fails or is interrupted.

    input     what the column layers were given last
    rng       the RNG states of sharded regions
    gathered  full weights that the forward that runs has gathered, by layer, name, whether
              gradients are formed, and version of the shard
    summed    views whose gradients are summed, with their parameters, by module state and name
    prepare   called before the forward, if set
    head      set while an output head waits that takes this rank's tokens of the hidden states
    """

    def __init__(self, input: SharedInput, *, rng: DropoutRNG) -> None:
        self.input = input
        self.rng = rng
        self.gathered: dict[tuple[nn.Module, str, bool, int], Tensor] = {}
        self.summed: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self.prepare: Callable[[], None] | None = None
        self.head: HeadOfOwnTokens | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._parts: weakref.WeakSet[nn.Module] | None = None  # its modules, once asked for
        self._depth = 0  # of calls of the model within its own forward
        self._call: tuple[int, FrameType] | None = None  # thread, and what runs our hooks there

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardContext:
        """One in which no forward runs, for the copy of a model.

        That of a part of the model cannot be trained: what sums gradients is copied with the model.
        """
        made = ForwardContext(copy.deepcopy(self.input, memo), rng=copy.deepcopy(self.rng, memo))
        made.prepare = self.prepare
        model = None if self._model is None else self._model()
        if model is not None and id(model) not in memo:
            made.input.refuse_gradients(type(model).__name__)
        elif model is not None:
            made._model = weakref.ref(memo[id(model)])
        return made

    @property
    def is_in_forward(self) -> bool:
        """Whether the model is being called."""
        self._leave_interrupted()
        return self._depth > 0

    @property
    def is_in_forward_of_part(self) -> bool:
        """Whether the model, or a module of it, as its backbone, is being called; not compiled."""
        if self.is_in_forward:
            return True
        model = None if self._model is None else self._model()
        if self._parts is None and model is not None:
            self._parts = weakref.WeakSet(model.modules())
        return self._parts is not None and is_called(self._parts)

    def register_hooks(self, model: nn.Module) -> list[RemovableHandle]:
        """Hooks around the forward of ``model``, which holds all sharded layers, and of the model
        inside of adapters, whose ``generate`` calls it."""
        self._model = weakref.ref(model)
        inner = without_adapters(model)
        return [
            handle
            for each in ([model] if inner is model else [model, inner])
            for handle in (
                each.register_forward_pre_hook(self._begin),
                each.register_forward_hook(self._end, always_call=True),
            )
        ]

    def _begin(self, model: nn.Module, args: object) -> None:
        self._leave_interrupted()
        self._depth += 1
        if self._depth > 1:
            return
        frame = None if torch.compiler.is_compiling() else inspect.currentframe()
        if frame is not None and frame.f_back is not None:
            self._call = threading.get_ident(), frame.f_back
        del frame  # which has itself among its variables, and would keep those of all callers
        if self.prepare is not None:
            self.prepare()
        self.rng.begin(model)

    def _end(self, model: object, args: object, output: object) -> None:
        # Also called where a hook before ours has failed, and ours was not reached.
        self._depth = max(0, self._depth - 1)
        if self._depth > 0:
            return
        self._call = None
        self.input.forget()
        self.gathered.clear()
        self.summed.clear()
        self.rng.end(failed=output is None)

    def _leave_interrupted(self) -> None:
        """Leave a forward that KeyboardInterrupt or SystemExit has ended, as hooks are called for
        an Exception alone: its call is not on the stack."""
        if torch.compiler.is_compiling() or self._call is None:
            return
        thread, call = self._call
        if thread != threading.get_ident():
            return
        frame = inspect.currentframe()
        while frame is not None:
            if frame is call:
                return
            frame = frame.f_back
        self._depth = 1
        self._end(None, (), None)
