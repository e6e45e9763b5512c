# SPDX-License-Identifier: Apache-2.0
"""One training step of a model, recorded in parts: what is alive, and what is sent.

A part begins where the forward of a block does, or where the gradient of its output is there. The
marks are hooks, which change neither the graph nor what is saved for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from deepspeed_autotp.distributed.lazy_sequence import LazySequence
from deepspeed_autotp.interop.labels import loss_of
from deepspeed_autotp.interop.live_bytes import LiveBytes, current_node, label_nodes, node_label
from deepspeed_autotp.interop.transformers import output_tensors
from deepspeed_autotp.vocab_parallel.head_product import HeadProduct

# Bytes of tensors, and of the gradients of parameters among what came to be.
Moment = tuple[int, int]
# A stack of blocks, by the name of its list, and the index of a block.
Block = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Call:
    """One collective: its kind, what this rank gives to it in bytes, among how many ranks, for
    which module, in the forward or the backward pass."""

    kind: str
    size: int
    ranks: int
    module: str
    phase: str


@dataclass(frozen=True, slots=True)
class Part:
    """What happened from one mark to the next; moments are relative to its start.

    ``block``  whose forward or backward it begins with; None before the first
    ``end``    what it has added
    ``moments``  those of which no other has both more alive and more gradients
    """

    phase: str
    block: Block | None
    end: Moment
    moments: tuple[Moment, ...]
    calls: tuple[Call, ...]


@dataclass(slots=True)
class _Open:
    """The part that is being recorded."""

    phase: str
    block: Block | None
    start: Moment
    moments: list[Moment] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Step:
    """``saved`` is alive between forward and backward; ``logits`` is that of the output head."""

    parts: tuple[Part, ...]
    saved: int
    logits: int


class StepRecorder:
    """Records one forward and backward of ``model``, whose tensors may be fake.

    ``stacks`` are the lists of its blocks by name, ``head`` its output head or None. Gradients are
    dropped as soon as they are complete.
    """

    def __init__(
        self, model: nn.Module, stacks: Mapping[str, nn.ModuleList], head: nn.Module | None
    ) -> None:
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._blocks = {block: (n, i) for n, s in stacks.items() for i, block in enumerate(s)}
        self._head = head
        self._live = LiveBytes(self._changed)
        self._phase = "forward"
        self._modules: list[str] = []
        self._gradients = 0
        self._counted: set[int] = set()
        self._parts: list[Part] = []
        self._open = _Open("forward", None, (0, 0))
        self._logits = 0

    def sent(self, kind: str, size: int, ranks: int) -> None:
        """A collective has started."""
        module = self._modules[-1] if self._modules else node_label(current_node())
        self._open.calls.append(Call(kind, size, ranks, module, self._phase))

    def run(self, inputs: Mapping[str, object]) -> Step:
        """The step on arguments ``inputs``. Without a loss in what the model returns, its first
        tensor of floating-point numbers is summed; ValueError where there is none."""
        model = self._model
        self._live.leave_out([*model.parameters(), *model.buffers()])
        self._live.leave_out(v for v in inputs.values() if isinstance(v, Tensor))
        with self._hooked(), self._live:
            output = model(**inputs)
            loss = loss_of(output)
            if loss is None:
                loss = _sum_of(output)
            del output
            saved = self._live.alive
            self._phase = "backward"
            loss.backward()
            del loss
            self._close()
        return Step(tuple(self._parts), saved, self._logits)

    def _now(self) -> Moment:
        return self._live.alive, self._gradients

    def _changed(self, alive: int) -> None:
        moments, start = self._open.moments, self._open.start
        live, gradients = alive - start[0], self._gradients - start[1]
        # In order of time the gradients grow: an earlier moment with less alive is covered.
        while moments and moments[-1][0] <= live:
            moments.pop()
        if not moments or gradients > moments[-1][1]:
            moments.append((live, gradients))

    def _close(self) -> None:
        part = self._open
        now = self._now()
        end = (now[0] - part.start[0], now[1] - part.start[1])
        self._parts.append(
            Part(part.phase, part.block, end, tuple(part.moments), tuple(part.calls))
        )

    def _mark(self, block: Block) -> None:
        self._close()
        self._open = _Open(self._phase, block, self._now())
        self._changed(self._live.alive)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = []
        try:
            for module in self._model.modules():
                handles.append(module.register_forward_pre_hook(self._enter))
                handles.append(module.register_forward_hook(self._leave, prepend=True))
            for parameter in self._model.parameters():
                if parameter.requires_grad:
                    hook = parameter.register_post_accumulate_grad_hook(self._accumulated)
                    handles.append(hook)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._modules.append(self._names[module])
        if self._phase == "forward" and module in self._blocks:
            self._mark(self._blocks[module])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        label_nodes(output, self._modules.pop())
        if self._phase == "backward":  # a block that is run again
            return
        if module is self._head and isinstance(output, Tensor):
            self._logits = max(self._logits, output.nbytes)
        elif module is self._head and isinstance(output, HeadProduct):
            self._logits = max(self._logits, output.chunk_bytes)
        if module in self._blocks:
            _on_gradient(output, lambda: self._mark(self._blocks[module]))

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None and id(parameter) not in self._counted:
            self._counted.add(id(parameter))
            self._gradients += parameter.grad.nbytes
        parameter.grad = None


def _on_gradient(output: Any, call: Callable[[], None]) -> None:
    """Call ``call`` once the gradient of the first tensor of ``output`` is there."""
    first = output[0] if isinstance(output, (tuple, list)) else output
    if isinstance(first, LazySequence):
        first = first.shard  # with a hook of its own it would be gathered
    if isinstance(first, Tensor) and first.requires_grad:
        first.register_hook(lambda gradient: call())


def _sum_of(output: Any) -> Tensor:
    for tensor in output_tensors(output):
        if tensor.is_floating_point() and tensor.requires_grad:
            return tensor.sum()
    raise ValueError("the model returns neither a loss nor a tensor that one can be made of")


def stacks_of(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of several modules, by name: the blocks of a model."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and not inside:
            found[name] = module
    return found


def block_kind(block: nn.Module) -> str:
    """What is alike of blocks that do the same: classes, shapes and settings, by name. The first
    line is " ClassName settings", which ``class_of_kind`` reads."""
    words = [
        f"{name} {type(module).__name__} {_settings(module)}"
        for name, module in block.named_modules()
    ]
    words += [f"{n} {tuple(p.shape)} {p.requires_grad}" for n, p in block.named_parameters()]
    return "\n".join(words)


def _settings(module: nn.Module) -> Sequence[tuple[str, object]]:
    return sorted(
        (key, value)
        for key, value in vars(module).items()
        if type(value) in (int, str, bool, float) and "idx" not in key and "index" not in key
    )
