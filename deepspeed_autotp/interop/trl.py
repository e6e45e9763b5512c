# SPDX-License-Identifier: Apache-2.0
"""The kernel of TRL's fused output head, which multiplies by ``lm_head.weight`` itself."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

# Where TRL 1.16 looks its kernel up, and the arguments that it calls ``apply`` with.
_MODULE, _NAME = "trl.trainer.utils", "_ChunkedLogProbFunction"
_ARGUMENTS = (
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_FIELDS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

# (hidden, weight, bias, targets, temperature, soft cap, scale) -> log-probabilities and _FIELDS, or
# None for a weight that is not sharded.
Statistics = Callable[..., tuple[Any, ...] | None]


class _Kernel:
    """In the place of TRL's; ``apply`` is all that TRL uses of it."""

    def __init__(self, kernel: Any, statistics: Statistics) -> None:
        self._kernel, self._statistics = kernel, statistics

    def apply(self, *args: Any) -> tuple[Any, ...]:
        given = dict(zip(_ARGUMENTS, args, strict=False))
        found = self._statistics(
            *(given[name] for name in ("hidden", "weight", "bias", "targets", "temperature")),
            given.get("final_logit_softcapping") or 0.0,
            given.get("logit_scale", 1.0),
        )
        if found is None:
            applied: tuple[Any, ...] = self._kernel.apply(*args)
            return applied
        wanted = given.get("outputs", _FIELDS)
        rest = zip(_FIELDS, found[1:], strict=True)
        return (found[0], *(value if name in wanted else None for name, value in rest))


def replace_head_kernel(statistics: Statistics) -> None:
    """Let TRL's fused head, where it was imported, ask ``statistics`` first. Another version of TRL
    whose kernel takes other arguments keeps its own, which is given the full weight."""
    known = vars(sys.modules.get(_MODULE, object))
    kernel = known.get(_NAME)
    if kernel is None or isinstance(kernel, _Kernel):
        return
    names = list(inspect.signature(kernel.forward).parameters)
    if tuple(names[1:]) == _ARGUMENTS:
        setattr(sys.modules[_MODULE], _NAME, _Kernel(kernel, statistics))
