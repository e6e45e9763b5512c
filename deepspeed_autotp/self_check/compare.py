# SPDX-License-Identifier: Apache-2.0
"""Where a run of the sharded model differs from one of the full model, and in which block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from torch import Tensor

from deepspeed_autotp._core import Entry, Kind, Layer, Plan, index_pattern
from deepspeed_autotp.distributed.sequence_collectives import SequenceLayout, local_rows
from deepspeed_autotp.self_check.rounding import differs, root_mean_square
from deepspeed_autotp.self_check.trace import Output, Run
from deepspeed_autotp.state.sharded_model import shard_of

# A gradient that is this much smaller than the largest may be rounding alone, as that of a key
# bias, which softmax makes vanish.
_VANISHING = 1e-3
_NAMED = 4


@dataclass(frozen=True, slots=True)
class Difference:
    """``block`` names the modules to plan anew, with ``*`` for each index; empty where unknown.
    ``replicate``: not even their layers are sharded individually; ``quiet``: without a warning."""

    text: str
    block: tuple[str, ...]
    replicate: bool = False
    quiet: bool = False


class Comparison:
    """One run of the model sharded by ``plan``, on ``rank``, against the run of the full model."""

    def __init__(self, plan: Plan, *, rank: int, full: Run) -> None:
        self._plan = plan
        self._rank = rank
        self._full = full
        # Attention that only takes its own heads of an input is sharded by its layers.
        self._sharded = {
            layer.module: layer for layer in plan.layers if layer.kind is not Kind.HEADS
        }
        self._large = {layer.module for layer in plan.layers if layer.is_large}
        self._order = full.order()
        self._reduce_scatter = {n for stack in plan.stacks for n in stack.reduce_scatter_output}

    def first(self, sharded: Run) -> Difference | None:
        """The first difference, in the order in which the model runs, or None."""
        found = self._outputs(sharded) or self._gradients(sharded.gradients)
        if found is None:
            return None
        return replace(found, text=f"the sharded model differs from the full model: {found.text}")

    def failure(self, sharded: Run, error: Exception) -> Difference:
        """What to say of a run that ended with ``error``."""
        running = sharded.running
        where = "the backward pass" if sharded.finals else running[-1] if running else ""
        where = where or "the model"
        last = [name for name in sharded.order() if name in self._sharded][-_NAMED:]
        # An individually sharded layer fails itself, or not at all.
        bound = [name for name in last if name not in self._large] or last
        culprit = where if where in self._sharded else bound[-1] if bound else None
        return self._due_to(
            culprit,
            f"the model cannot run with this plan: {where} failed with "
            f"{type(error).__name__}: {error}; sharded on the way: {self._rules(last)}",
        )

    def _outputs(self, sharded: Run) -> Difference | None:
        full = self._full
        for got, expected in zip_longest(sharded.outputs, full.outputs):
            if problem := _unlike(got, self._own(expected)):
                ran = [] if expected is None else [*expected.since, expected.module]
                return self._said(problem, ran)
        if len(sharded.finals) != len(full.finals):
            counts = f"{len(sharded.finals)} outputs instead of {len(full.finals)}"
            return self._said(f"it returns {counts}", self._order)
        for a, b in zip(sharded.finals, full.finals, strict=True):
            if difference := differs(a, b):
                return self._said(f"the model's output {difference}", full.ran or self._order)
        return None

    def _own(self, expected: Output | None) -> Output | None:
        """What this rank has of an output of the full model: where tokens are sharded, its own."""
        if expected is None or expected.module not in self._reduce_scatter:
            return expected
        ranks = self._plan.ranks
        own = (local_rows(x, SequenceLayout.of(x, ranks), self._rank) for x in expected.tensors)
        return replace(expected, tensors=tuple(own))

    def _said(self, what: str, ran: Sequence[str]) -> Difference:
        last = next(
            (name for name in (*reversed(ran), *reversed(self._order)) if name in self._sharded),
            None,
        )
        return self._due_to(last, f"{what}; sharded on the way: {self._rules(ran)}")

    def _due_to(self, culprit: str | None, text: str) -> Difference:
        if culprit in self._large:
            return Difference(text, (index_pattern(culprit),), replicate=True, quiet=True)
        return Difference(text, self._sharded[culprit].block if culprit else ())

    def _gradients(self, sharded: Mapping[int, Tensor]) -> Difference | None:
        """The last one in the order of the model: an error spreads to all that comes before."""
        full_gradients = self._full.gradients
        least = _VANISHING * max(map(root_mean_square, full_gradients.values()), default=0.0)
        for index in sorted(full_gradients, reverse=True):
            full, entry = full_gradients[index], self._plan.entries[index]
            if index not in sharded:
                return self._of_gradient(
                    entry, f"{entry.name} has no gradient when the model is sharded"
                )
            expected = (
                full if not entry.is_sharded else shard_of(full, entry=entry, rank=self._rank)
            )
            if difference := differs(sharded[index], expected, least=least):
                rule = f"rule {entry.rule} from {entry.source}" if entry.rule else "no rule"
                advice = (
                    ". If each rank uses this weight for its own heads or features only, its "
                    "gradients have to be summed: partition_type 'skip' with grad_allreduce true"
                    if not entry.is_sharded
                    else ""
                )
                text = f"the gradient of {entry.name} ({entry.kind}; {rule}) {difference}{advice}"
                return self._of_gradient(entry, text)
        return None

    def _of_gradient(self, entry: Entry, text: str) -> Difference:
        found = self._due_to(self._blamed(entry.name), text)
        if entry.kind is Kind.REPLICATED_SUM and not covers(found.block, entry.name):
            return Difference(text, (index_pattern(entry.name.rpartition(".")[0]),))
        return found

    def _blamed(self, parameter: str) -> str | None:
        """The sharded layer through which a parameter's gradient comes: its own, or else the first
        one that its module's output reaches."""
        module = parameter.rpartition(".")[0]
        if module in self._sharded:
            return module
        order = self._order
        at = order.index(module) if module in order else 0
        reached = [*order[at:], *reversed(order[:at])]
        bound = (name for name in reached if name in self._sharded and name not in self._large)
        return next(bound, None) or next((name for name in reached if name in self._sharded), None)

    def _rules(self, modules: Iterable[str]) -> str:
        """The sharded layers among ``modules``, each with its rule."""
        layers = [self._sharded[name] for name in dict.fromkeys(modules) if name in self._sharded]
        return ", ".join(self._rule(layer) for layer in layers[-_NAMED:]) or "nothing"

    def _rule(self, layer: Layer) -> str:
        if layer.weight < 0:
            return f"{layer.module} ({layer.kind})"
        entry = self._plan.entries[layer.weight]
        return f"{layer.module} ({layer.kind}; rule {entry.rule} from {entry.source})"


def _unlike(got: Output | None, expected: Output | None) -> str | None:
    """How one output in the order of a run differs from that of the full model."""
    if got is None or expected is None or got.module != expected.module:
        names = ["nothing" if each is None else each.module for each in (got, expected)]
        return f"{names[0]} runs in place of {names[1]}"
    if len(got.tensors) != len(expected.tensors):
        counts = f"{len(got.tensors)} tensors instead of {len(expected.tensors)}"
        return f"the output of {expected.module} has {counts}"
    for a, b in zip(got.tensors, expected.tensors, strict=True):
        if difference := differs(a, b):
            return f"the output of {expected.module} {difference}"
    return None


def covers(block: Sequence[str], name: str) -> bool:
    """Whether a name is below a module of ``block``, whatever its indices."""
    return any(index_pattern(name).startswith(f"{module}.") for module in block)
