# SPDX-License-Identifier: Apache-2.0
"""The training of a sharded model compared with that of the full one, module by module."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspeed_autotp._core import Entry
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.self_check.compare import Comparison
from deepspeed_autotp.self_check.rounding import allowed, difference, root_mean_square
from deepspeed_autotp.self_check.trace import Run
from deepspeed_autotp.self_check.training import Training
from deepspeed_autotp.state.sharded_model import TensorParallel, shard_of

# A gradient or a change that is this much smaller than the largest is rounding alone.
_VANISHING = 1e-3
# Each step adds its own rounding to what the steps before have left in the weights.
_GROWTH = 4.0

Call = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Measured:
    """The relative difference of one thing: ``what`` is "output", "gradient" or "weights" of a
    module, or "loss" or "gradient norm" of the model in step ``step``."""

    module: str
    what: str
    error: float
    allowed: float
    step: int = 0

    @property
    def is_wrong(self) -> bool:
        return not self.error <= self.allowed

    def __str__(self) -> str:
        of = f"step {self.step + 1}" if self.what in ("loss", "gradient norm") else self.module
        how = "has another shape" if math.isinf(self.error) else f"differs by {self.error:.2g}"
        return f"the {self.what} of {of or 'the model'} {how} (allowed {self.allowed:.0e})"


@dataclass(frozen=True, slots=True)
class FullTraining:
    """The training of the full model, its weights before, and for a 16-bit model the training
    that is rounded otherwise."""

    training: Training
    before: list[Tensor]
    rounded: Training | None


def measured(
    sharded: Training, full: FullTraining, state: TensorParallel, agreement: Agreement
) -> list[Measured]:
    """All that can be compared on this rank, outputs in the order of the run."""
    found = list(_outputs(sharded, full, state, agreement))
    found += _gradients(sharded, full, state)
    found += _weights(sharded, full, state)
    found += _steps(sharded, full)
    return found


def first_difference(sharded: Training, full: FullTraining, state: TensorParallel) -> str | None:
    """What the self-check would say of the first step on this rank."""
    exits = {layer.module for layer in state.plan.layers if layer.has_full_output}
    if state.plan.logits_layer is not None:
        exits.discard(state.plan.logits_layer.module)
    rounded = full.rounded.first_with(exits) if full.rounded is not None else None
    comparison = Comparison(
        state.plan, rank=state.group.rank, full=full.training.first_with(exits), rounded=rounded
    )
    found = comparison.first(sharded.first_with(exits))
    return None if found is None else found.text


def unseen_modules(state: TensorParallel, modules: Mapping[str, object]) -> list[str]:
    """The output head that keeps its shard of the logits, and what returns that."""
    head = state.plan.logits_layer
    if head is None:
        return []
    return [name for name in modules if f"{head.module}.".startswith(f"{name}." if name else "")]


def _outputs(
    sharded: Training, full: FullTraining, state: TensorParallel, agreement: Agreement
) -> Iterator[Measured]:
    """Of modules whose output is full: those that the plan says, and all others whose output is
    the same on every rank."""
    own, expected = _by_call(sharded.first), _by_call(full.training.first)
    rounded = {} if full.rounded is None else _by_call(full.rounded.first)
    full_outputs = {layer.module for layer in state.plan.layers if layer.has_full_output}
    digests = agreement.exchange({call: _digest(tensors) for call, tensors in own.items()})
    for call, tensors in own.items():
        is_alike = all(each.get(call) == digests[0].get(call) for each in digests)
        wanted, others = expected.get(call, ()), rounded.get(call, ())
        if not (is_alike or call[0] in full_outputs) or len(wanted) != len(tensors):
            continue
        for at, (a, b) in enumerate(zip(tensors, wanted, strict=True)):
            if a.shape == b.shape and b.is_floating_point():
                other = others[at] if at < len(others) else None
                yield Measured(call[0], "output", difference(a, b), allowed(b, other))


def _by_call(run: Run) -> dict[Call, tuple[Tensor, ...]]:
    """Outputs by the module and the number of its call."""
    found: dict[Call, tuple[Tensor, ...]] = {}
    for output in run.outputs:
        number = 0
        while (output.module, number) in found:
            number += 1
        found[output.module, number] = output.tensors
    return found


def _digest(tensors: tuple[Tensor, ...]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.digest()


def _gradients(sharded: Training, full: FullTraining, state: TensorParallel) -> Iterator[Measured]:
    expected = full.training.first.gradients
    rounded = None if full.rounded is None else full.rounded.first.gradients
    least = _VANISHING * max(map(root_mean_square, expected.values()), default=0.0)
    for index, entry in enumerate(state.plan.entries):
        if entry.is_tied or index not in expected:
            continue
        own = sharded.first.gradients.get(index)
        other = None if rounded is None else rounded.get(index)
        yield _of_entry(entry, "gradient", own, (expected[index], other), least, state.group.rank)


def _weights(sharded: Training, full: FullTraining, state: TensorParallel) -> Iterator[Measured]:
    """By how much the weights have changed, which is small beside the weights themselves."""
    rank = state.group.rank
    changes = _changes(full.training, full.before)
    others = None if full.rounded is None else _changes(full.rounded, full.before)
    least = _VANISHING * max(map(root_mean_square, changes), default=0.0)
    for index, entry in enumerate(state.plan.entries):
        if entry.is_tied or not state.parameters[index].requires_grad:
            continue
        before = full.before[index]
        own_before = shard_of(before, entry=entry, rank=rank) if entry.is_sharded else before
        own = sharded.weights[index]
        change = own - own_before if own.shape == own_before.shape else None
        other = None if others is None else others[index]
        yield _of_entry(entry, "weights", change, (changes[index], other), least, rank)


def _changes(training: Training, before: list[Tensor]) -> list[Tensor]:
    return [after - full for after, full in zip(training.weights, before, strict=True)]


def _of_entry(
    entry: Entry,
    what: str,
    own: Tensor | None,
    expected: tuple[Tensor, Tensor | None],
    least: float,
    rank: int,
) -> Measured:
    """``own`` is this rank's shard, ``expected`` full, and the same of the run that is rounded
    otherwise."""
    full, other = expected
    if entry.is_sharded:
        full = shard_of(full, entry=entry, rank=rank)
        other = None if other is None else shard_of(other, entry=entry, rank=rank)
    is_comparable = own is not None and own.shape == full.shape
    error = difference(own, full, least=least) if own is not None and is_comparable else math.inf
    module = entry.name.rpartition(".")[0]
    return Measured(module, what, error, allowed(full, other, least))


def _steps(sharded: Training, full: FullTraining) -> Iterator[Measured]:
    dtype = full.before[0].dtype
    expected, rounded = full.training, full.rounded
    for what, own, wanted, others, shape in (
        ("loss", sharded.losses, expected.losses, rounded and rounded.losses, ()),
        # A norm differs by what gradients may.
        ("gradient norm", sharded.norms, expected.norms, rounded and rounded.norms, (1,)),
    ):
        for step, (a, b) in enumerate(zip(own, wanted, strict=True)):
            other = others[step].to(dtype).reshape(shape) if others else None
            bound = allowed(b.to(dtype).reshape(shape), other) * (1 + _GROWTH * step)
            yield Measured("", what, difference(a, b), bound, step=step)
