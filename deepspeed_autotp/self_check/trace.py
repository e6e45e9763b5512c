# SPDX-License-Identifier: Apache-2.0
"""One run of a model as hooks see it: which modules ran, their outputs, gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepspeed_autotp.interop.transformers import output_tensors


@dataclass(frozen=True, slots=True)
class Output:
    """What one call of a module returned, and the modules that ran since the output before."""

    module: str
    tensors: tuple[Tensor, ...]
    since: tuple[str, ...]


@dataclass(slots=True)
class Run:
    """``gradients`` by the index of the parameter; ``running`` is innermost last."""

    outputs: list[Output] = field(default_factory=list)
    finals: list[Tensor] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)

    def order(self) -> list[str]:
        """Every module that ran, a module called twice twice, in order."""
        return [name for output in self.outputs for name in output.since] + self.ran


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

    def differentiate(self, parameters: Mapping[int, nn.Parameter]) -> None:
        """Gradients of a fixed weighted sum of the outputs."""
        run = self.run
        ends = [t for t in run.finals if t.requires_grad]
        if ends and parameters:
            found = torch.autograd.grad(
                ends, list(parameters.values()), [_weights(t) for t in ends], allow_unused=True
            )
            run.gradients = {i: g for i, g in zip(parameters, found, strict=True) if g is not None}
        run.finals = [t.detach() for t in run.finals]

    def _enter(self, name: str) -> Callable[[nn.Module, object], None]:
        def hook(module: nn.Module, args: object) -> None:
            self.run.running.append(name)
            self.run.ran.append(name)

        return hook

    def _leave(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            run = self.run
            run.running.pop()
            if name in self._exits:
                tensors = tuple(t.detach().clone() for t in output_tensors(output))
                run.outputs.append(Output(name, tensors, tuple(run.ran)))
                run.ran.clear()

        return hook


def _weights(t: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(4)
    return torch.randn(t.shape, generator=draw).to(t)
