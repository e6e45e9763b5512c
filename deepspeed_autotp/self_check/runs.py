# SPDX-License-Identifier: Apache-2.0
"""Runs of a model that are compared: in which ways it is run, and the run of the full model."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from deepspeed_autotp._core import Plan
from deepspeed_autotp.interop.bitsandbytes import computing_in_float32
from deepspeed_autotp.planning.model_description import Description
from deepspeed_autotp.self_check.inputs import Inputs
from deepspeed_autotp.self_check.isolation import fix_rng, isolated, kept_numbers
from deepspeed_autotp.self_check.outside_reads import OutsideReads
from deepspeed_autotp.self_check.precision import in_float32, is_16_bit, rounded_otherwise
from deepspeed_autotp.self_check.tiny_values import drawn_values, tiny_parameters
from deepspeed_autotp.self_check.trace import Run, Trace
from deepspeed_autotp.self_check.without_randomness import WithoutRandomness

# The gradient of a full weight is formed for the comparison; above this size it is left out.
_LARGEST_GRADIENT = 1 << 26
# Beyond this many elements there may be no room for the weights of a 16-bit model in 32 bits.
_LARGEST_IN_FLOAT32 = 4_000_000_000


@dataclass(frozen=True, slots=True)
class Way:
    """How a model is run.

    labelled  labels are among the ``inputs``, and the gradients are those of the loss
    float32   whatever its data type; or else a second run shows what rounding does
    drawn     weights that are zero have values that are drawn
    training  in training mode
    """

    inputs: Mapping[str, object]
    labelled: bool
    float32: bool
    drawn: bool = False
    training: bool = True


@dataclass(frozen=True, slots=True)
class Reference:
    """A run of the full model, how it was run, and for a 16-bit one a run rounded otherwise."""

    way: Way
    run: Run
    rounded: Run | None


class Runs:
    """Runs of one model, forward and backward, of which nothing stays.

    ``plan`` is the first one to be checked: what it shards says what is compared.
    """

    def __init__(self, description: Description, plan: Plan) -> None:
        self._model = model = description.modules[""]
        self._description = description
        self.device = description.parameters[0].device
        self._head = plan.logits_layer
        self._exits = {layer.module for layer in plan.layers if layer.has_full_output}
        tensors = [*model.parameters(), *model.buffers()]
        self._attempts: list[tuple[Reference | None, str]] = []
        self._is_16_bit = is_16_bit(tensors)
        self._fits = sum(t.numel() for t in tensors) <= _LARGEST_IN_FLOAT32
        self._sampled = [
            index
            for index in plan.samples
            if not plan.entries[index].is_tied
            and description.parameters[index].requires_grad
            and description.parameters[index].numel() <= _LARGEST_GRADIENT
        ]

    def ways(self, inputs: Inputs) -> Iterator[Way]:
        """From the one that shows most; the next one is for a model that cannot run in this."""
        given = [(inputs.labelled, True)] if inputs.labelled is not None else []
        given.append((inputs.values, False))
        for values, labelled in given:
            for float32 in (True, False) if self._is_16_bit and self._fits else (False,):
                if self._tiny:
                    yield Way(values, labelled, float32=float32, drawn=True)
                yield Way(values, labelled, float32=float32)
        yield Way(inputs.values, labelled=False, float32=False, training=False)

    def attempt(self, way: Way) -> tuple[Reference | None, str]:
        """The full model run in that way, and why it cannot be, or not be compared with."""
        try:
            found = self.reference(way)
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"
        if not found.run.is_finite():
            return None, "its outputs are not finite"
        if way.labelled and found.run.loss is None:
            return None, "its output has no loss"
        return found, ""

    def attempts(self, inputs: Inputs) -> Iterator[tuple[Reference | None, str]]:
        """The attempts of all ways, each made once; ``inputs`` are always the same."""
        for at, way in enumerate(self.ways(inputs)):
            if at == len(self._attempts):
                self._attempts.append(self.attempt(way))
            yield self._attempts[at]

    def can_run(self, inputs: Inputs) -> bool:
        return any(found is not None for found, _ in self.attempts(inputs))

    @contextmanager
    def weights(self, way: Way) -> Iterator[None]:
        """A context in which the weights have the data type and the values of ``way``."""
        exact = way.float32 or not self._is_16_bit
        with (
            computing_in_float32(self._model, enabled=exact),
            in_float32(self._model) if way.float32 else nullcontext(),
            drawn_values(self._tiny if way.drawn else ()),
        ):
            yield

    @functools.cached_property
    def _tiny(self) -> list[nn.Parameter]:
        return tiny_parameters(self._model)

    def reference(self, way: Way) -> Reference:
        """The full model, run in that way; raises what it raises."""
        with self.weights(way):
            trace = self.trace(way)
            with OutsideReads(self._description.modules, trace.run):
                self.go(trace, way)
            rounded = None
            if self._is_16_bit and not way.float32:
                other = self.trace(way)
                with rounded_otherwise(self._model):
                    self.go(other, way)
                rounded = other.run
        return Reference(way, trace.run, rounded)

    def trace(self, way: Way) -> Trace:
        # What the output head gives is compared behind it: it may keep its shard.
        head = self._head
        keeps = head is not None and way.training and "labels" in way.inputs
        exits = self._exits - {head.module} if head is not None and keeps else self._exits
        return Trace(self._description.modules, exits=exits)

    def go(self, trace: Trace, way: Way) -> None:
        """Forward and backward."""
        parameters = {i: self._description.parameters[i] for i in self._sampled}
        fix_rng(self.device)
        # What a module keeps of one run, as a recurrent state, is no input of the next.
        with (
            isolated(self._model, self.device, training=way.training),
            torch.enable_grad(),
            WithoutRandomness(trace.drawn),
            trace,
        ):
            before = kept_numbers(self._model)
            output = self._model(**way.inputs)
            trace.differentiate(output, parameters, labelled=way.labelled)
            trace.run.kept = {
                name: number
                for name, number in kept_numbers(self._model).items()
                if name not in before or not torch.equal(number, before[name])
            }
