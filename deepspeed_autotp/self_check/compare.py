# SPDX-License-Identifier: Apache-2.0
"""Where a run of the sharded model differs from one of the full model, and in which block."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from torch import Tensor

from deepspeed_autotp._core import Entry, Kind, Layer, Plan, index_pattern
from deepspeed_autotp.distributed.sequence_collectives import SequenceLayout, local_rows
from deepspeed_autotp.self_check.rounding import differs, root_mean_square
from deepspeed_autotp.self_check.trace import Dropout, Output, Run
from deepspeed_autotp.state.sharded_model import shard_of

# A gradient that is this much smaller than the largest may be rounding alone, as that of a key
# bias, which softmax makes vanish.
_VANISHING = 1e-3
_NAMED = 4


@dataclass(frozen=True, slots=True)
class Difference:
    """``block`` names the modules to plan anew, with ``*`` for each index; empty where unknown.
    ``replicate``: not even their layers are sharded individually; ``quiet``: without a warning;
    ``logits``: it may come of sharded logits; ``gathering``: blocks that gather the tokens at their
    input and reduce-scatter their output, the one that ran last first."""

    text: str
    block: tuple[str, ...]
    replicate: bool = False
    quiet: bool = False
    logits: bool = False
    gathering: tuple[str, ...] = ()


class Comparison:
    """One run of the model sharded by ``plan``, on ``rank``, against the run of the full model;
    ``rounded`` is one that was rounded otherwise, as a 16-bit model needs."""

    def __init__(self, plan: Plan, *, rank: int, full: Run, rounded: Run | None = None) -> None:
        self._plan = plan
        self._rank = rank
        self._full = full
        self._rounded = _no_longer(Run() if rounded is None else rounded, full)
        # Attention that only takes its own heads of an input is sharded by its layers.
        self._sharded = {
            layer.module: layer for layer in plan.layers if layer.kind is not Kind.HEADS
        }
        self._large = {layer.module for layer in plan.layers if layer.is_large}
        self._order = full.order()
        self._gathering = {
            block
            for stack in plan.stacks
            for row in stack.reduce_scatter_output
            for block in enclosing(row, stack.gather_input)
        }
        self._scattered = {
            name
            for stack in plan.stacks
            for name in (*stack.reduce_scatter_output, *stack.gather_scatter)
        }

    def first(self, sharded: Run) -> Difference | None:
        """The first difference, in the order in which the model runs, or None."""
        found = self._outputs(sharded)
        if found is None and (ends := self._ends(sharded) or self._gradients(sharded.gradients)):
            found = replace(ends, logits=self._plan.logits_layer is not None)
        found = found or self._kept(sharded)
        if found is None:
            return None
        return replace(found, text=f"the sharded model differs from the full model: {found.text}")

    def failure(self, sharded: Run, error: Exception, *, hint: str) -> Difference:
        """What to say of a run that ended with ``error``, with a ``hint`` at its end."""
        running = sharded.running
        where = "the backward pass" if sharded.in_backward else running[-1] if running else ""
        where = where or "the model"
        last = [name for name in sharded.order() if name in self._sharded][-_NAMED:]
        # An individually sharded layer fails itself, or not at all.
        bound = [name for name in last if name not in self._large] or last
        culprit = where if where in self._sharded else bound[-1] if bound else None
        text = (
            f"the model cannot run with this plan: {where} failed with "
            f"{type(error).__name__}: {error}; sharded on the way: {self._rules(last)}{hint}"
        )
        found = self._used_outside(running[-1:] or [""], text) or self._due_to(culprit, text)
        return replace(
            found,
            logits=self._plan.logits_layer is not None,
            gathering=self._ran_gathering(sharded.order()),
        )

    def replicated_dropouts(self, sharded: Run) -> dict[int, Dropout]:
        """Dropout of activations that every rank has in full, by the number of its call."""
        pairs = enumerate(zip(sharded.dropouts, self._full.dropouts, strict=False))
        return {at: own for at, (own, full) in pairs if own.shape == full.shape}

    def dropout(self, module: str) -> Difference:
        """What to say of dropout within ``module`` that is not the same on all ranks."""
        return self._due_to(
            self._blamed(f"{module}."),
            f"dropout or other random numbers in {module or 'the model'} are drawn anew on each "
            "rank, for an activation that all ranks have in full; sharded on the way: "
            f"{self._rules(self._order[: self._at(module) + 1])}",
        )

    def _outputs(self, sharded: Run) -> Difference | None:
        triples = zip_longest(sharded.outputs, self._full.outputs, self._rounded.outputs)
        ran: list[str] = []
        for got, expected, rounded in triples:
            ran += [] if expected is None else [*expected.since, expected.module]
            if problem := _unlike(got, self._own(expected, got), self._own(rounded, got)):
                last = [] if expected is None else [*expected.since, expected.module]
                return replace(self._said(problem, last), gathering=self._ran_gathering(ran))
        return None

    def _ends(self, sharded: Run) -> Difference | None:
        """The loss and the other outputs of the model."""
        full, rounded = self._full, self._rounded
        ran = [*(full.ran or self._order), ""]  # the model itself
        if (sharded.loss is None) != (full.loss is None):
            return self._said("it returns a loss in one of the two only", ran)
        if len(sharded.finals) != len(full.finals):
            counts = f"{len(sharded.finals)} outputs instead of {len(full.finals)}"
            return self._said(f"it returns {counts}", self._order)
        # The logits, which say more, come first.
        for a, b, other in zip_longest(sharded.finals, full.finals, rounded.finals):
            if problem := differs(a, b, rounded=other):
                return self._said(f"the model's output {problem}", ran)
        if sharded.loss is not None and full.loss is not None:
            problem = differs(sharded.loss, full.loss, rounded=rounded.loss)
            if problem:
                return self._said(f"the model's loss {problem}", ran)
        return None

    def _ran_gathering(self, ran: Sequence[str]) -> tuple[str, ...]:
        """The blocks of ``ran`` that gather the tokens, the last one first; as in a Difference."""
        found = (owner for name in reversed(ran) for owner in enclosing(name, self._gathering))
        return tuple(dict.fromkeys(map(index_pattern, found)))

    def _own(self, full: Output | None, got: Output | None) -> Output | None:
        """What this rank has of an output of the full model: where tokens are sharded, its own,
        unless ``got`` has all, as without gradients."""
        if full is None or got is None or full.module not in self._scattered:
            return full
        pairs = zip_longest(full.tensors, got.tensors[: len(full.tensors)])
        own = (x if y is None or y.shape == x.shape else self._tokens_of(x) for x, y in pairs)
        return replace(full, tensors=tuple(own))

    def _tokens_of(self, x: Tensor) -> Tensor:
        return local_rows(x, SequenceLayout.of(x, self._plan.ranks), self._rank)

    def _said(self, what: str, ran: Sequence[str]) -> Difference:
        last = next(
            (name for name in (*reversed(ran), *reversed(self._order)) if name in self._sharded),
            None,
        )
        text = f"{what}; sharded on the way: {self._rules(ran)}"
        return self._used_outside(ran, text) or self._due_to(last, text)

    def _used_outside(self, places: Collection[str], text: str) -> Difference | None:
        """That a module among ``places`` uses a weight of a sharded layer, which is not in it. The
        output head gives such a use all of its weight."""
        head = self._plan.logits_layer
        for name, place in self._full.outside_reads.items():
            if place in places and name in self._sharded and (head is None or name != head.module):
                used = f"{place or 'the model'} uses the weight of {name} itself: {text}"
                return Difference(used, (index_pattern(name),), replicate=True)
        return None

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
            other = self._rounded.gradients.get(index)
            if other is not None and entry.is_sharded:
                other = shard_of(other, entry=entry, rank=self._rank)
            if problem := differs(sharded[index], expected, least=least, rounded=other):
                rule = f"rule {entry.rule} from {entry.source}" if entry.rule else "no rule"
                advice = (
                    ". If each rank uses this weight for its own heads or features only, its "
                    "gradients have to be summed: partition_type 'skip' with grad_allreduce true"
                    if not entry.is_sharded
                    else ""
                )
                text = f"the gradient of {entry.name} ({entry.kind}; {rule}) {problem}{advice}"
                return self._of_gradient(entry, text)
        return None

    def _kept(self, sharded: Run) -> Difference | None:
        """What a module keeps for its next call, as a running statistic. A tensor that has other
        sizes on this rank is of its own features."""
        for name, full in self._full.kept.items():
            got = sharded.kept.get(name)
            if got is not None and got.shape != full.shape:
                continue
            other = self._rounded.kept.get(name)
            problem = "is not changed" if got is None else differs(got, full, rounded=other)
            if problem:
                what = f"{name}, which the model changes as it runs, {problem}"
                found = self._due_to(self._blamed(name), f"{what}; it would act in the next step")
                return replace(found, gathering=self._ran_gathering([name]))
        return None

    def _of_gradient(self, entry: Entry, text: str) -> Difference:
        found = self._due_to(self._blamed(entry.name), text)
        found = replace(found, gathering=self._ran_gathering([entry.name]))
        if entry.kind is Kind.REPLICATED_SUM and not covers(found.block, entry.name):
            return replace(found, block=(index_pattern(entry.name.rpartition(".")[0]),))
        return found

    def _blamed(self, parameter: str) -> str | None:
        """The sharded layer through which a parameter's gradient comes: its own, or else the first
        one that its module's output reaches."""
        module = parameter.rpartition(".")[0]
        if module in self._sharded:
            return module
        order, at = self._order, self._at(module)
        reached = [*order[at:], *reversed(order[:at])]
        bound = (name for name in reached if name in self._sharded and name not in self._large)
        return next(bound, None) or next((name for name in reached if name in self._sharded), None)

    def _at(self, module: str) -> int:
        """The place of a module in the order of the run; 0 where it did not run."""
        return self._order.index(module) if module in self._order else 0

    def _rules(self, modules: Iterable[str]) -> str:
        """The sharded layers among ``modules``, each with its rule."""
        layers = [self._sharded[name] for name in dict.fromkeys(modules) if name in self._sharded]
        return ", ".join(self._rule(layer) for layer in layers[-_NAMED:]) or "nothing"

    def _rule(self, layer: Layer) -> str:
        if layer.weight < 0:
            return f"{layer.module} ({layer.kind})"
        entry = self._plan.entries[layer.weight]
        return f"{layer.module} ({layer.kind}; rule {entry.rule} from {entry.source})"


def _unlike(got: Output | None, expected: Output | None, rounded: Output | None) -> str | None:
    """How one output in the order of a run differs from that of the full model."""
    if got is None or expected is None or got.module != expected.module:
        names = ["nothing" if each is None else each.module for each in (got, expected)]
        return f"{names[0]} runs in place of {names[1]}"
    if len(got.tensors) != len(expected.tensors):
        counts = f"{len(got.tensors)} tensors instead of {len(expected.tensors)}"
        return f"the output of {expected.module} has {counts}"
    others = () if rounded is None or rounded.module != expected.module else rounded.tensors
    rows = zip_longest(got.tensors, expected.tensors, others[: len(expected.tensors)])
    for a, b, other in rows:
        if problem := differs(a, b, rounded=other):
            return f"the output of {expected.module} {problem}"
    return None


def _no_longer(run: Run, full: Run) -> Run:
    """``run`` without what comes behind the end of ``full``."""
    return replace(
        run, outputs=run.outputs[: len(full.outputs)], finals=run.finals[: len(full.finals)]
    )


def enclosing(name: str, modules: Collection[str]) -> Iterator[str]:
    """``name`` and the modules around it, as far as they are among ``modules``, innermost first."""
    while name:
        if name in modules:
            yield name
        name = name.rpartition(".")[0]


def covers(block: Sequence[str], name: str) -> bool:
    """Whether a name is below a module of ``block``, whatever its indices."""
    return any(index_pattern(name).startswith(f"{module}.") for module in block)
