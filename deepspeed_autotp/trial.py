# SPDX-License-Identifier: Apache-2.0
"""The trial: the sharded model against the whole one, before any tensor is cut.

A few tokens go through the model whole and through the model with every cut weight lent as a
view. Outputs of the layers that give whole outputs, the model's outputs, and the gradients of
one parameter of each kind are compared; the first module that differs is named.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from deepspeed_autotp import interop
from deepspeed_autotp._core import Plan
from deepspeed_autotp.agree import Agreement
from deepspeed_autotp.convert import Conversion
from deepspeed_autotp.describe import Description
from deepspeed_autotp.group import TPGroup
from deepspeed_autotp.lockstep import PeerFailed, Strayed, lockstep
from deepspeed_autotp.rounding import differs, root_mean_square
from deepspeed_autotp.sharded import cut
from deepspeed_autotp.untouched import same_numbers, untouched
from deepspeed_autotp.watch import Seen, Watch

_log = logging.getLogger("deepspeed_autotp")

# A trial runs the whole model three times over sixteen tokens. Beyond this many parameters
# that takes minutes on a host, so it runs only where it is asked for.
_LARGEST_TRIAL = 2_000_000_000
# A gradient as large as the weight is formed for the comparison; above this it is left out.
_LARGEST_GRADIENT = 1 << 26
# A gradient that is this much smaller than the largest may be rounding alone, as that of a key
# bias, which softmax makes vanish.
_VANISHING = 1e-3
_WHOLE_OUTPUT = ("row", "vocabulary", "hidden")
_NAMED = 4


class Inputs:
    """Keyword arguments of the model; ``insist`` where a trial that cannot run is an error."""

    def __init__(self, values: Mapping[str, object], *, insist: bool) -> None:
        self.values = values
        self.insist = insist


def agreed_inputs(
    model: nn.Module,
    description: Description,
    wanted: bool | str,
    given: Mapping[str, object] | None,
    agreement: Agreement,
) -> Inputs | None:
    """What the trial is run with, the same on every rank, or None for no trial.

    ValueError on every rank when the trial was asked for and no inputs are known, or when the
    ranks were given different ones.
    """
    inputs = agreement.together(
        lambda: _inputs(model, description, wanted, given, warn=agreement.is_first)
    )
    values = {} if inputs is None else inputs.values
    said = {f"example_inputs[{key!r}]": _digest(value) for key, value in values.items()}
    agreement.same({"a trial": str(inputs is not None), **said}, "what the trial is run with")
    return inputs


def _inputs(
    model: nn.Module,
    description: Description,
    wanted: bool | str,
    given: Mapping[str, object] | None,
    *,
    warn: bool,
) -> Inputs | None:
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(
            f"example_inputs: got {type(given).__name__}, expected a dictionary of keyword "
            f"arguments of {type(model).__name__}"
        )
    if wanted is False:
        return None
    insist = wanted is True or given is not None
    values = given
    if values is None:
        values = interop.trial_inputs(model, device=description.parameters[0].device)
    if values is None:
        if insist:
            raise ValueError(
                f"self_check is on, but what {type(model).__name__} takes as input is not known; "
                "pass example_inputs to deepspeed_autotp.parallelize"
            )
        if warn:
            _log.warning(
                "the plan for %s is not tried, since what it takes as input is not known: a wrong "
                "rule would train wrongly in silence. Pass example_inputs to "
                "deepspeed_autotp.parallelize, which may come before initialize, or set "
                "tensor_parallel.self_check to false.",
                type(model).__name__,
            )
        return None
    if not insist and sum(p.numel() for p in model.parameters()) > _LARGEST_TRIAL:
        if warn:
            _log.info("no trial of a model this large; self_check: true runs it")
        return None
    return Inputs(values, insist=insist)


def _digest(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    data = bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{list(value.shape)} {hashlib.blake2b(data, digest_size=8).hexdigest()}"


class Trial:
    """Runs and compares; the model is as it was before, whatever happens."""

    def __init__(
        self, model: nn.Module, description: Description, plan: Plan, *, group: TPGroup
    ) -> None:
        self._model = model
        self._description = description
        self._plan = plan
        self._group = group
        self._device = description.parameters[0].device
        self._cut = {layer.module: layer for layer in plan.layers}
        self._exits = {
            layer.module
            for layer in plan.layers
            if layer.kind in _WHOLE_OUTPUT or layer.gather_output
        }
        self._watched = [
            index
            for index in (row.index for row in plan.table())
            if plan.entries[index].tied_to < 0
            and description.parameters[index].requires_grad
            and description.parameters[index].numel() <= _LARGEST_GRADIENT
        ]

    def run(self, inputs: Inputs, *, agreement: Agreement) -> None:
        """ValueError on every rank of ``agreement`` when the sharded model is another one.

        Nothing is compared where the whole model cannot take inputs that were only guessed, or
        its outputs are not finite, as with weights that are not loaded yet.
        """
        with untouched(self._model, self._device):
            whole = self._whole(inputs, agreement)
            if whole is None:
                return
            agreement.together(lambda: self._check(inputs.values, whole))

    def _whole(self, inputs: Inputs, agreement: Agreement) -> Seen | None:
        """The run of the whole model, or None where there is nothing to compare with."""
        watch = self._watch()
        try:
            self._pass(watch, inputs.values)
            finite = all(bool(t.isfinite().all()) for t in watch.seen.finals)
            problem = "" if finite else "its outputs are not finite"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        problems = agreement.exchange(problem)
        if not any(problems):
            return watch.seen

        def refuse() -> None:
            if problem and (inputs.insist or not all(problems)):
                raise ValueError(f"the trial cannot run the model, which is whole yet: {problem}")

        agreement.together(refuse)
        _log.info("no trial: %s cannot be run whole: %s", type(self._model).__name__, problem)
        return None

    def _check(self, inputs: Mapping[str, object], whole: Seen) -> None:
        conversion = Conversion(self._description, plan=self._plan, group=self._group)
        watch = self._watch()
        try:
            with lockstep(self._group):
                conversion.switch()
                conversion.lend()
                try:
                    self._pass(watch, inputs)
                except (PeerFailed, Strayed):
                    raise
                except Exception as error:
                    raise ValueError(self._failed(watch, error)) from error
        except PeerFailed:
            return  # the rank that failed has the words
        except Strayed as error:
            raise ValueError(f"the model takes another way on each rank: {error}") from error
        finally:
            conversion.undo()
        problem = self._compare(whole, watch.seen)
        if problem is not None:
            raise ValueError(f"the sharded model is not the whole model: {problem}")

    def _watch(self) -> Watch:
        return Watch(self._description.modules, exits=self._exits)

    def _pass(self, watch: Watch, inputs: Mapping[str, object]) -> None:
        """Forward and backward."""
        parameters = {i: self._description.parameters[i] for i in self._watched}
        same_numbers(self._device)
        with torch.enable_grad(), watch:
            watch.seen.finals = interop.output_tensors(self._model(**inputs))
            watch.differentiate(parameters)

    def _compare(self, whole: Seen, sharded: Seen) -> str | None:
        """The first difference, in the order in which the model runs, or None."""
        for got, expected in zip(sharded.outputs, whole.outputs, strict=False):
            for a, b in zip(got.tensors, expected.tensors, strict=False):
                if difference := differs(a, b):
                    cut_here = self._rules([*expected.since, expected.module])
                    return (
                        f"the output of {expected.module} {difference}; cut on the way: {cut_here}"
                    )
        if len(sharded.finals) != len(whole.finals):
            return f"it gives {len(sharded.finals)} outputs instead of {len(whole.finals)}"
        for a, b in zip(sharded.finals, whole.finals, strict=True):
            if difference := differs(a, b):
                return f"the model's output {difference}; cut on the way: {self._rules(whole.ran)}"
        return self._compare_gradients(whole.gradients, sharded.gradients)

    def _compare_gradients(
        self, whole: Mapping[int, torch.Tensor], sharded: Mapping[int, torch.Tensor]
    ) -> str | None:
        least = _VANISHING * max(map(root_mean_square, whole.values()), default=0.0)
        for index, full in whole.items():
            entry = self._plan.entries[index]
            if index not in sharded:
                return f"{entry.name} has no gradient when the model is sharded"
            part = full if entry.dim < 0 else cut(full, entry=entry, rank=self._group.rank)
            if difference := differs(sharded[index], part, least=least):
                rule = f"rule {entry.rule} from {entry.source}" if entry.rule else "no rule"
                advice = (
                    ". If each rank uses this weight for its own part only, the parts have to be "
                    "summed: partition_type 'skip' with grad_allreduce true"
                    if entry.dim < 0
                    else ""
                )
                return f"the gradient of {entry.name} ({entry.kind}; {rule}) {difference}{advice}"
        return None

    def _failed(self, watch: Watch, error: Exception) -> str:
        running, ran = watch.seen.running, watch.seen.ran
        where = "the backward pass" if watch.seen.finals else running[-1] if running else ""
        where = where or type(self._model).__name__
        seen = [name for output in watch.seen.outputs for name in output.since] + ran
        last = [name for name in seen if name in self._cut][-_NAMED:]
        return (
            f"the model cannot run with this plan: {where} failed with "
            f"{type(error).__name__}: {error}; cut on the way: {self._rules(last)}"
        )

    def _rules(self, modules: Sequence[str]) -> str:
        """The layers among ``modules`` that are cut, each with its rule."""
        layers = [self._cut[name] for name in dict.fromkeys(modules) if name in self._cut]
        words = []
        for layer in layers[-_NAMED:]:
            entry = self._plan.entries[layer.weight]
            words.append(f"{layer.module} ({layer.kind}; rule {entry.rule} from {entry.source})")
        return ", ".join(words) or "nothing"
