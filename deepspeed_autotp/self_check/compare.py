# SPDX-License-Identifier: Apache-2.0
"""Where a sharded run of a model departs from the whole one, and which block is to blame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from torch import Tensor

from deepspeed_autotp._core import Entry, Kind, Layer, Plan, index_pattern
from deepspeed_autotp.distributed.sequence_mappings import SequenceLayout, local_rows
from deepspeed_autotp.self_check.rounding import differs, root_mean_square
from deepspeed_autotp.self_check.trace import Output, Seen
from deepspeed_autotp.state.tensor_parallel import shard_of

# A gradient that is this much smaller than the largest may be rounding alone, as that of a key
# bias, which softmax makes vanish.
_VANISHING = 1e-3
_NAMED = 4


@dataclass(frozen=True, slots=True)
class Difference:
    """``block`` names the modules that are to blame, each index as ``*``; empty if nobody knows.
    ``whole``: not even their layers one by one are cut; ``quiet``: nobody expects them to be."""

    text: str
    block: tuple[str, ...]
    whole: bool = False
    quiet: bool = False


class Comparison:
    """One sharded run under ``plan``, seen by ``rank``, against the run of the whole model."""

    def __init__(self, plan: Plan, *, rank: int, whole: Seen) -> None:
        self._plan = plan
        self._rank = rank
        self._whole = whole
        # Attention that takes its heads of what it is given is cut by its layers.
        self._cut = {layer.module: layer for layer in plan.layers if layer.kind is not Kind.HEADS}
        self._alone = {layer.module for layer in plan.layers if layer.alone}
        self._order = whole.order()
        self._outlets = {name for stack in plan.stacks for name in stack.outlets}

    def first(self, sharded: Seen) -> Difference | None:
        """The first difference, in the order in which the model runs, or None."""
        found = self._outputs(sharded) or self._gradients(sharded.gradients)
        if found is None:
            return None
        return replace(found, text=f"the sharded model is not the whole model: {found.text}")

    def failure(self, sharded: Seen, error: Exception) -> Difference:
        """What to say of a run that ended with ``error``."""
        running = sharded.running
        where = "the backward pass" if sharded.finals else running[-1] if running else ""
        where = where or "the model"
        last = [name for name in sharded.order() if name in self._cut][-_NAMED:]
        # What is cut alone fails by itself, or not at all.
        bound = [name for name in last if name not in self._alone] or last
        culprit = where if where in self._cut else bound[-1] if bound else None
        return self._due_to(
            culprit,
            f"the model cannot run with this plan: {where} failed with "
            f"{type(error).__name__}: {error}; cut on the way: {self._rules(last)}",
        )

    def _outputs(self, sharded: Seen) -> Difference | None:
        whole = self._whole
        for got, expected in zip_longest(sharded.outputs, whole.outputs):
            if problem := _unlike(got, self._own(expected)):
                ran = [] if expected is None else [*expected.since, expected.module]
                return self._said(problem, ran)
        if len(sharded.finals) != len(whole.finals):
            counts = f"{len(sharded.finals)} outputs instead of {len(whole.finals)}"
            return self._said(f"it gives {counts}", self._order)
        for a, b in zip(sharded.finals, whole.finals, strict=True):
            if difference := differs(a, b):
                return self._said(f"the model's output {difference}", whole.ran or self._order)
        return None

    def _own(self, expected: Output | None) -> Output | None:
        """What this rank gives of an output of the whole model: its tokens, where they are cut."""
        if expected is None or expected.module not in self._outlets:
            return expected
        ranks = self._plan.ranks
        own = (local_rows(x, SequenceLayout.of(x, ranks), self._rank) for x in expected.tensors)
        return replace(expected, tensors=tuple(own))

    def _said(self, what: str, ran: Sequence[str]) -> Difference:
        last = next(
            (name for name in (*reversed(ran), *reversed(self._order)) if name in self._cut), None
        )
        return self._due_to(last, f"{what}; cut on the way: {self._rules(ran)}")

    def _due_to(self, culprit: str | None, text: str) -> Difference:
        if culprit in self._alone:
            return Difference(text, (index_pattern(culprit),), whole=True, quiet=True)
        return Difference(text, self._cut[culprit].block if culprit else ())

    def _gradients(self, sharded: Mapping[int, Tensor]) -> Difference | None:
        """The last one in the order of the model: an error spreads to all that comes before."""
        whole = self._whole.gradients
        least = _VANISHING * max(map(root_mean_square, whole.values()), default=0.0)
        for index in sorted(whole, reverse=True):
            full, entry = whole[index], self._plan.entries[index]
            if index not in sharded:
                return self._of_gradient(
                    entry, f"{entry.name} has no gradient when the model is sharded"
                )
            part = full if not entry.is_sharded else shard_of(full, entry=entry, rank=self._rank)
            if difference := differs(sharded[index], part, least=least):
                rule = f"rule {entry.rule} from {entry.source}" if entry.rule else "no rule"
                advice = (
                    ". If each rank uses this weight for its own part only, the parts have to be "
                    "summed: partition_type 'skip' with grad_allreduce true"
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
        """The cut layer that makes the gradient of a parameter: its own, or else the first one
        that its module's output reaches."""
        module = parameter.rpartition(".")[0]
        if module in self._cut:
            return module
        order = self._order
        at = order.index(module) if module in order else 0
        reached = [*order[at:], *reversed(order[:at])]
        bound = (name for name in reached if name in self._cut and name not in self._alone)
        return next(bound, None) or next((name for name in reached if name in self._cut), None)

    def _rules(self, modules: Iterable[str]) -> str:
        """The layers among ``modules`` that are cut, each with its rule."""
        layers = [self._cut[name] for name in dict.fromkeys(modules) if name in self._cut]
        return ", ".join(self._rule(layer) for layer in layers[-_NAMED:]) or "nothing"

    def _rule(self, layer: Layer) -> str:
        if layer.weight < 0:
            return f"{layer.module} ({layer.kind})"
        entry = self._plan.entries[layer.weight]
        return f"{layer.module} ({layer.kind}; rule {entry.rule} from {entry.source})"


def _unlike(got: Output | None, expected: Output | None) -> str | None:
    """How one output in the order of a run differs from that of the whole model."""
    if got is None or expected is None or got.module != expected.module:
        names = ["nothing" if each is None else each.module for each in (got, expected)]
        return f"{names[0]} runs in the place of {names[1]}"
    if len(got.tensors) != len(expected.tensors):
        counts = f"{len(got.tensors)} tensors instead of {len(expected.tensors)}"
        return f"the output of {expected.module} has {counts}"
    for a, b in zip(got.tensors, expected.tensors, strict=True):
        if difference := differs(a, b):
            return f"the output of {expected.module} {difference}"
    return None


def covers(block: Sequence[str], name: str) -> bool:
    """Whether a name lies under a module of ``block``, whatever its indices."""
    return any(index_pattern(name).startswith(f"{module}.") for module in block)
