# SPDX-License-Identifier: Apache-2.0
"""The trial: the sharded model against the whole one, before any tensor is cut.

A few tokens go through the model whole and through the model with every cut weight lent as a
view. Outputs of the layers that give whole outputs, the model's outputs, and the gradients of
one parameter of each kind are compared; the first module that differs is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp import interop
from deepspeed_autotp._core import Plan
from deepspeed_autotp.convert import Conversion
from deepspeed_autotp.describe import Description
from deepspeed_autotp.group import TPGroup
from deepspeed_autotp.sharded import cut

# Sums in another order differ by rounding; a wrong cut differs by about one. Between the
# two there is a wide gap, and these bounds lie in it.
_BOUNDS = {
    torch.float64: 1e-8,
    torch.float32: 2e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 2e-1,
}
# A gradient as large as the weight is formed for the comparison; above this it is left out.
_LARGEST_GRADIENT = 1 << 26


class PeerFailed(RuntimeError):
    """Another rank failed in the trial; its own error says why."""


@dataclass(slots=True)
class _Seen:
    """What one run showed."""

    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    finals: list[Tensor] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    entered: str = ""


class Trial:
    """Runs and compares. ``problem`` of one rank says what differs, or is None."""

    def __init__(self, model: nn.Module, description: Description, plan: Plan) -> None:
        self._model = model
        self._description = description
        self._plan = plan
        self._exits = [
            layer.module
            for layer in plan.layers
            if layer.kind in ("row", "vocabulary", "hidden") or layer.gather_output
        ]
        self._watched = [
            index
            for index in (row.index for row in plan.table())
            if plan.entries[index].tied_to < 0
            and description.parameters[index].requires_grad
            and description.parameters[index].numel() <= _LARGEST_GRADIENT
        ]

    def problem(self, inputs: Mapping[str, object], *, group: TPGroup) -> str | None:
        """Run both and compare. Raises PeerFailed where only another rank failed."""
        with _evaluating(self._model):
            whole = self._run(inputs)
            if not all(t.isfinite().all() for t in whole.finals):
                return None  # weights that are not loaded yet give nothing to compare
            conversion = Conversion(self._description, plan=self._plan, group=group)
            with _lockstep(group):
                try:
                    conversion.switch()
                    conversion.lend()
                    sharded = self._run(inputs)
                except PeerFailed:
                    raise
                except Exception as error:
                    raise ValueError(self._failed(error)) from error
                finally:
                    conversion.undo()
        return self._compare(whole, sharded, rank=group.rank)

    def _run(self, inputs: Mapping[str, object]) -> _Seen:
        seen = _Seen()
        self._seen = seen
        hooks = []
        for name in self._exits:
            module = self._description.modules[name]
            hooks.append(module.register_forward_hook(_record(seen, name)))
        for name in (layer.module for layer in self._plan.layers):
            module = self._description.modules[name]
            hooks.append(module.register_forward_pre_hook(_enter(seen, name)))
        try:
            with torch.enable_grad():
                seen.finals = interop.output_tensors(self._model(**inputs))
                self._differentiate(seen)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _differentiate(self, seen: _Seen) -> None:
        """Gradients of a fixed weighted sum of the outputs, for the watched parameters."""
        ends = [t for t in seen.finals if t.requires_grad]
        if ends and self._watched:
            weights = [_fixed_weights(t) for t in ends]
            parameters = [self._description.parameters[i] for i in self._watched]
            found = torch.autograd.grad(ends, parameters, weights, allow_unused=True)
            seen.gradients = {
                i: g for i, g in zip(self._watched, found, strict=True) if g is not None
            }
        seen.finals = [t.detach() for t in seen.finals]

    def _compare(self, whole: _Seen, sharded: _Seen, *, rank: int) -> str | None:
        for name, expected in whole.outputs.items():
            for a, b in zip(sharded.outputs.get(name, []), expected, strict=False):
                if difference := _differs(a, b):
                    return f"the output of {name} {difference}; rule: {self._rule(name)}"
        for a, b in zip(sharded.finals, whole.finals, strict=False):
            if difference := _differs(a, b):
                return f"the model's output {difference}"
        for index, full in whole.gradients.items():
            entry = self._plan.entries[index]
            expected_part = full if entry.dim < 0 else cut(full, entry=entry, rank=rank)
            got = sharded.gradients.get(index)
            if got is None:
                return f"{entry.name} has no gradient when the model is sharded"
            if difference := _differs(got, expected_part):
                return (
                    f"the gradient of {entry.name} ({entry.kind}; rule: {entry.rule or 'none'}) "
                    f"{difference}"
                )
        return None

    def _failed(self, error: Exception) -> str:
        where = self._seen.entered or type(self._model).__name__
        return (
            f"the model cannot run with this plan. It failed after entering {where} (rule: "
            f"{self._rule(where)}) with {type(error).__name__}: {error}"
        )

    def _rule(self, module: str) -> str:
        for layer in self._plan.layers:
            if layer.module == module:
                entry = self._plan.entries[layer.weight]
                return f"{entry.rule} from {entry.source}"
        return "none"


def _record(seen: _Seen, name: str) -> Callable[[nn.Module, object, object], None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        seen.outputs.setdefault(name, []).extend(
            t.detach().clone() for t in interop.output_tensors(output)
        )

    return hook


def _enter(seen: _Seen, name: str) -> Callable[[nn.Module, object], None]:
    def hook(module: nn.Module, args: object) -> None:
        seen.entered = name

    return hook


def _fixed_weights(t: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(4)
    return torch.randn(t.shape, generator=draw).to(t)


def _differs(got: Tensor, expected: Tensor) -> str | None:
    if got.shape != expected.shape:
        return f"has shape {list(got.shape)} instead of {list(expected.shape)}"
    a, b = got.detach().double(), expected.detach().double()
    error = float((a - b).norm() / b.norm().clamp_min(1e-12))
    bound = _BOUNDS.get(expected.dtype, _BOUNDS[torch.float32])
    if error <= bound:
        return None
    return f"differs from the whole model's by {error:.2g} of its norm (allowed {bound:.0e})"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, so that both runs draw no random numbers; modes are restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _lockstep(group: TPGroup) -> Iterator[None]:
    """Ahead of every collective each rank says that it is well, and once more at the end.

    A rank that fails says so in the place of its next collective, so that its peers leave
    theirs with PeerFailed instead of waiting for the process group's timeout.
    """

    def say(well: bool) -> None:
        flag = torch.full((1,), int(well), dtype=torch.int32, device=group.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group.handle)
        if well and not flag.item():
            raise PeerFailed("another rank failed in the trial")

    group.before = lambda: say(True)
    try:
        yield
        say(True)
    except PeerFailed:
        raise
    except BaseException:
        say(False)
        raise
    finally:
        group.before = None
