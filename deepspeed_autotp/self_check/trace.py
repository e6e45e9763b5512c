# SPDX-License-Identifier: Apache-2.0
"""One run of a model as hooks see it: which modules ran, their outputs, gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepspeed_autotp.interop.labels import loss_of
from deepspeed_autotp.interop.torch_private import gradients, with_leaves
from deepspeed_autotp.interop.transformers import output_tensors
from deepspeed_autotp.self_check.isolation import rng_digest
from deepspeed_autotp.vocab_parallel.lazy_logits import LazyLogits

_SEED = 4


@dataclass(frozen=True, slots=True)
class Output:
    """What one call of a module returned, and the modules that ran since the output before."""

    module: str
    tensors: tuple[Tensor, ...]
    since: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dropout:
    """An activation that dropout is applied to within ``module``, or random numbers that are drawn
    there, and the RNG state then."""

    module: str
    shape: tuple[int, ...]
    rng: int


@dataclass(slots=True)
class Run:
    """``gradients`` by the index of the parameter; ``running`` is innermost last.

    ``loss`` is what the gradients are of, or None where they are of a fixed weighted sum of the
    ``finals``, the model's outputs. ``in_backward``: the forward has ended. ``outside_reads`` are
    filled by :class:`OutsideReads`. ``kept`` are the numbers that modules keep and that the run has
    changed, at its end.
    """

    outputs: list[Output] = field(default_factory=list)
    loss: Tensor | None = None
    finals: list[Tensor] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    dropouts: list[Dropout] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    in_backward: bool = False
    outside_reads: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def order(self) -> list[str]:
        """Every module that ran, a module called twice twice, in order."""
        return [name for output in self.outputs for name in output.since] + self.ran

    def is_finite(self) -> bool:
        ends = self.finals if self.loss is None else [self.loss, *self.finals]
        return all(bool(t.isfinite().all()) for t in ends)


class Trace:
    """Within it, hooks on every module of ``modules``; outputs of ``exits`` are kept."""

    def __init__(self, modules: Mapping[str, nn.Module], *, exits: Collection[str]) -> None:
        self.run = Run()
        self._modules = modules
        self._exits = exits
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> None:
        # Ahead of hooks that are there, which belong to the run of the module, too.
        for name, module in self._modules.items():
            self._hooks.append(module.register_forward_pre_hook(self._enter(name), prepend=True))
            self._hooks.append(module.register_forward_hook(self._leave(name)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def drawn(self, x: Tensor) -> None:
        """Note what dropout is applied to, or what was drawn."""
        run = self.run
        if not run.in_backward:
            within = run.running[-1] if run.running else ""
            run.dropouts.append(Dropout(within, tuple(x.shape), rng_digest(x.device)))

    def differentiate(
        self, output: object, parameters: Mapping[int, nn.Parameter], *, labelled: bool
    ) -> None:
        """Keep the model's ``output``, and gradients of its loss where it is ``labelled``."""
        run, (ends, weights) = self.run, self._ends(output, labelled=labelled)
        if ends and parameters:
            of = [torch.ones_like(t) for t in ends] if weights is None else weights
            found = gradients(ends, of, list(parameters.values()))
            run.gradients = {i: g for i, g in zip(parameters, found, strict=True) if g is not None}

    def objective(self, output: object, *, labelled: bool) -> Tensor:
        """Keep the model's ``output``; the number whose gradients :meth:`differentiate` keeps.

        ValueError where no gradient can be formed."""
        ends, weights = self._ends(output, labelled=labelled)
        if not ends:
            raise ValueError("no output of the model has a gradient")
        if weights is None:
            return ends[0]
        return torch.stack([(t * w).sum() for t, w in zip(ends, weights, strict=True)]).sum()

    def _ends(self, output: object, *, labelled: bool) -> tuple[list[Tensor], list[Tensor] | None]:
        """What is differentiated, each with its weight; without weights it is the loss."""
        run = self.run
        # Sharded logits are gathered for who reads them, and before the backward.
        output = with_leaves(LazyLogits, LazyLogits.full, output)
        finals = output_tensors(output)
        loss = loss_of(output) if labelled else None
        run.finals = [_plain(t) for t in finals if t is not loss]
        run.loss = None if loss is None else loss.detach().clone()
        run.in_backward = True
        ends = [t for t in (finals if loss is None else [loss]) if t.requires_grad]
        return ends, [_weights(t) for t in ends] if loss is None else None

    def _enter(self, name: str) -> Callable[[nn.Module, object], None]:
        def hook(module: nn.Module, args: object) -> None:
            if not self.run.in_backward:  # or else it is a recomputation
                self.run.running.append(name)
                self.run.ran.append(name)

        return hook

    def _leave(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            run = self.run
            if run.in_backward:
                return
            run.running.pop()
            if name in self._exits:
                tensors = tuple(t.detach().clone() for t in output_tensors(output))
                run.outputs.append(Output(name, tensors, tuple(run.ran)))
                run.ran.clear()

        return hook


@torch.no_grad()
def _plain(t: Tensor) -> Tensor:
    """A copy that is an ordinary tensor."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)


def _weights(t: Tensor) -> Tensor:
    # Not drawn by torch: without randomness that would be 0.
    return torch.from_numpy(np.random.default_rng(_SEED).standard_normal(t.shape)).to(t)
