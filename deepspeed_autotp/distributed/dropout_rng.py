# SPDX-License-Identifier: Apache-2.0
"""RNG states of sharded regions, between a column layer and the row layer behind it.

In a sharded region a rank draws dropout masks for its own heads or features, which have to be
independent of those of other ranks; elsewhere it draws for what all ranks have, and the masks have
to be equal. As with Megatron-LM's model-parallel RNG state, a region has an RNG state of its own
on each rank, and the common state continues behind it.

Activation checkpointing restores the common state alone, of which it knows. So the state of a
region follows from the common state at its begin and from the rank, and a recomputation draws the
same masks. The common state advances by a fixed amount per region, so the next one draws others.
Whether a rank is inside of a region is never read off a state: regions begin and end within the
forward of a module that holds their layers, and end with it, also by an exception, as the one by
which a recomputation stops early.

A model that draws nothing has no regions, and its RNG state is never touched. That is found out in
its first training call, in which the regions are there, unless its modules say that they drop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp.distributed.rng_observation import (
    Observation,
    default_generator,
    is_capturing,
)
from deepspeed_autotp.interop.torch_private import backward_id

_REASON = "deepspeed_autotp: ranks draw dropout masks of their own between column and row layers"


@dataclass(slots=True)
class _Region:
    """One that has begun; ``common`` is the state to continue with, ``own`` that of a region which
    is suspended."""

    generator: torch.Generator
    common: Tensor
    of_tokens: bool
    own: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Uncompiled:
    """What changes RNG states, in a compiled model: each call breaks the graph."""

    enter: Callable[[DropoutRNG, torch.device, bool], None]
    leave: Callable[[DropoutRNG], None]
    run_block: Callable[..., Any]
    run_dropout: Callable[..., Any]

    @staticmethod
    def make() -> _Uncompiled:
        disable: Callable[..., Any] = torch.compiler.disable
        return _Uncompiled(
            enter=disable(DropoutRNG._enter, reason=_REASON),
            leave=disable(DropoutRNG._leave, reason=_REASON),
            run_block=disable(DropoutRNG._run_block, recursive=False, reason=_REASON),
            run_dropout=disable(DropoutRNG._run_dropout, reason=_REASON),
        )


class DropoutRNG:
    """The RNG states of one sharded model on this rank.

    declared  modules of the model say that they drop
    uneven    ranks have different widths, and would draw different amounts without regions
    """

    def __init__(self, rank: int, *, declared: bool, uneven: bool) -> None:
        self._rank = rank
        self._uneven = uneven
        self._is_drawing: bool | None = None  # not known yet
        self._draws_from_next_call = False
        self._uncompiled: _Uncompiled | None = None
        self._region: _Region | None = None
        self._depth = 0  # of forwards of modules that hold regions
        self._is_training: bool | None = None  # outside of a forward of the model
        self._observation: Observation | None = None
        if declared:
            self._set_drawing()
        elif uneven:
            self._uncompiled = _Uncompiled.make()

    def __deepcopy__(self, memo: object) -> DropoutRNG:
        """One outside of a region, for the copy of a model."""
        made = DropoutRNG(self._rank, declared=bool(self._is_drawing), uneven=self._uneven)
        made._is_drawing = self._is_drawing
        return made

    @property
    def is_active(self) -> bool:
        """Whether there are regions: in a model of which anything is in training mode, whatever the
        mode of a layer. Nothing is observed in a compiled model."""
        if self._is_training is False:
            return False
        if self._is_drawing is None and not self._uneven:
            return not torch.compiler.is_compiling()
        return self._is_drawing is not False

    @property
    def is_outside(self) -> bool:
        """Whether a part of the model is called alone: no forward runs, and none is recomputed."""
        return self._is_training is None and backward_id() < 0

    def run_outside(
        self,
        block: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """As ``run_block`` outside of a forward of the model, in the mode of ``block``."""
        self._is_training = any(module.training for module in block.modules())
        try:
            if self.is_active:
                return self.run_block(forward, args, kwargs)
            return forward(*args, **kwargs)
        finally:
            self._is_training = None

    def begin(self, model: nn.Module) -> None:
        """Before an outermost forward of ``model``, which holds all regions."""
        self._depth += 1
        if self._draws_from_next_call:
            self._set_drawing()
        # Each module has a mode of its own, and dropout alone may be in training. Where nothing is
        # drawn that is not asked: it takes 0.5 us a module, in each step of generation.
        is_asked = not torch.compiler.is_compiling() and self._is_drawing is not False
        modules = model.modules() if is_asked else [model]
        self._is_training = any(module.training for module in modules)
        if self._is_drawing or not self._is_training:
            return
        device = next(model.parameters()).device
        if not (torch.compiler.is_compiling() or is_capturing(device)):
            self._observation = Observation(default_generator(device))

    def end(self, *, failed: bool) -> None:
        """Behind that forward, also where ``begin`` was not reached."""
        self._depth = max(0, self._depth - 1)
        self._is_training = None
        if self._region is not None:
            self.leave()
        observed, self._observation = self._observation, None
        if observed is not None and not failed:
            self._conclude(observed)

    def enter(self, device: torch.device, *, of_tokens: bool = False) -> None:
        """Use this rank's RNG state from here on; no effect inside of a region.

        ``of_tokens``: the tokens are sharded, not the features.
        """
        if torch.compiler.is_compiling() and self._uncompiled is not None:
            self._uncompiled.enter(self, device, of_tokens)
        else:
            self._enter(device, of_tokens)

    def leave(self) -> None:
        """Back to the common RNG state, advanced; no effect outside of a region."""
        if torch.compiler.is_compiling() and self._uncompiled is not None:
            self._uncompiled.leave(self)
        else:
            self._leave()

    def run_block(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """``forward`` of a module that holds a region, which ends with it at the latest."""
        if torch.compiler.is_compiling() and self._uncompiled is not None:
            return self._uncompiled.run_block(self, forward, args, kwargs)
        return self._run_block(forward, args, kwargs)

    def run_dropout(self, forward: Callable[..., Any], x: Tensor, *, sharded: bool) -> Any:
        """``forward`` of a dropout of ``x``: this rank's own features, or what all ranks have."""
        if torch.compiler.is_compiling() and self._uncompiled is not None:
            return self._uncompiled.run_dropout(self, forward, x, sharded)
        return self._run_dropout(forward, x, sharded)

    def check_called_from_block(self) -> None:
        """RuntimeError for a layer at an end of a region that no module around it has called.

        Nothing would end the region, and a recomputation would draw other masks.
        """
        if self._depth == 0 and self._is_drawing and torch.is_grad_enabled():
            raise RuntimeError(
                "a sharded layer of a model with dropout was called outside of the forward of the "
                "module that holds it and its row or column layer, so its dropout masks are not "
                "known; call that module, let torch.utils.checkpoint take modules or functions "
                "that call them, or set the dropout probabilities to 0"
            )

    def _enter(self, device: torch.device, of_tokens: bool) -> None:
        if self._region is not None or (self._depth == 0 and not of_tokens):
            return
        if is_capturing(device):
            self._refuse_capture()
            return
        generator = default_generator(device)
        self._look(generator)
        common = generator.get_state()
        # The states of CPU and CUDA generators are CPU tensors: no device is waited for.
        digest = hashlib.blake2b(bytes(common.numpy()), digest_size=7).digest()
        generator.manual_seed(int.from_bytes(digest, "little") + self._rank)
        self._region = _Region(generator, common, of_tokens)
        self._expect()

    def _leave(self) -> None:
        region, self._region = self._region, None
        if region is None:
            return
        generator = region.generator
        self._look(generator)
        generator.set_state(region.common)
        # Without the advance the next region would have the state of this one.
        if generator.device.type == "cuda":
            generator.set_offset(generator.get_offset() + 4)
        else:
            torch.empty(()).random_(generator=generator)
        self._expect()

    def _run_block(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        outer = self._region
        is_nested = outer is not None and not outer.of_tokens
        if is_nested:
            self._suspend()
        self._depth += 1
        try:
            output = forward(*args, **kwargs)
            if self._region is not None and not self._region.of_tokens:
                self._leave()
            return output
        except BaseException:
            if self._region is not outer:
                self._leave()
            raise
        finally:
            self._depth -= 1
            if is_nested:
                self._resume(outer)

    def _run_dropout(self, forward: Callable[..., Any], x: Tensor, sharded: bool) -> Any:
        region = self._region
        if region is None and sharded:
            self._depth += 1
            self._enter(x.device, False)
            try:
                return forward(x)
            finally:
                self._leave()
                self._depth -= 1
        if region is None or region.of_tokens or sharded:
            return forward(x)
        self._suspend()
        try:
            return forward(x)
        finally:
            self._resume(region)

    def _suspend(self) -> None:
        """Continue with the common RNG state within a region."""
        region, self._region = self._region, None
        assert region is not None
        self._look(region.generator)
        region.own = region.generator.get_state()
        region.generator.set_state(region.common)
        self._expect()

    def _resume(self, region: _Region | None) -> None:
        assert region is not None and region.own is not None
        self._look(region.generator)
        region.common = region.generator.get_state()
        region.generator.set_state(region.own)
        self._region = region
        self._expect()

    def _conclude(self, observed: Observation) -> None:
        observed.look()
        if not observed.has_drawn:
            observed.generator.set_state(observed.first)
            # Where ranks draw different amounts, what draws in a later call only is seen too late.
            if not self._uneven:
                self._is_drawing = False
        elif self._is_drawing is None:
            self._set_drawing()
        else:  # this call had no regions, and neither may its recomputation in the backward
            self._draws_from_next_call = True

    def _set_drawing(self) -> None:
        self._is_drawing, self._draws_from_next_call = True, False
        self._uncompiled = self._uncompiled or _Uncompiled.make()

    def _look(self, generator: torch.Generator) -> None:
        if self._observation is not None:
            self._observation.has_drawn |= self._observation.generator is not generator
            self._observation.look()

    def _expect(self) -> None:
        if self._observation is not None:
            self._observation.expect()

    def _refuse_capture(self) -> None:
        if self._is_drawing:
            raise RuntimeError(
                "a sharded model with dropout was called while a CUDA graph is captured, in which "
                "an RNG state cannot be exchanged, so ranks would draw equal masks for different "
                "heads; set the dropout probabilities to 0, or capture no graph"
            )
