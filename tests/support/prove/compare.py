# SPDX-License-Identifier: Apache-2.0
"""One case on ranks: both runs, and how far they are apart."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.log_records import logged_warnings
from tests.support.prove.case import Case
from tests.support.prove.refusals import Refused
from tests.support.prove.sharded import load_and_finish, train_and_save, train_sharded
from tests.support.prove.training import (
    Curve,
    Gradients,
    add_lora,
    lora_targets,
    make,
    train_unsharded,
)

# In float64. Sums over ranks are formed in another order, which gives some 1e-15 of the largest
# number, times what norms and softmax make of it; whatever is wrong is more than 1e-6.
BOUND = 1e-9
# What is much smaller than the largest gradient is rounded with it.
FLOOR = 1e-3
# Where not all is in float64: how much further from float64 the sharded run may be than one process
# that computes in the same precision: in bfloat16 with autocast, or with gradients and weights that
# are rounded to float32, as ZeRO does. Both round each number equally often, at other places.
MARGIN = 16.0
# Where one process gives other numbers once its weights change by this part of them, its training
# diverges, and nothing can be compared.
NUDGE = 1e-14


@dataclass(frozen=True, slots=True)
class Outcome:
    """``kind``: same, refused, differs or unstable; ``share`` of the parameters on a rank."""

    kind: str
    text: str = ""
    share: float = 1.0
    warnings: tuple[str, ...] = ()


def run_case(case: Case, folder: str) -> Outcome:
    """On every rank of a run; the same outcome on all. ``folder`` is empty."""
    with logged_warnings() as warnings:
        try:
            curve, masks, share = train_sharded(case, dtype_of(case), folder)
        except Refused as error:
            return Outcome("refused", str(error), warnings=tuple(warnings))
    return compared(case, [curve], masks, share, tuple(warnings))


def begin_case(case: Case, folder: str) -> tuple[Outcome, Curve]:
    """All but the last step of a case, on every rank, with a checkpoint in ``folder``."""
    with logged_warnings() as warnings:
        try:
            curve, share = train_and_save(case, dtype_of(case), folder)
        except Refused as error:
            return Outcome("refused", str(error), warnings=tuple(warnings)), Curve()
    return Outcome("same", "", share, tuple(warnings)), curve


def finish_case(case: Case, folder: str, begun: Sequence[Curve], share: float) -> Outcome:
    """The rest, on every rank of another run. ``begun`` are the curves of all ranks of the first,
    which may be more or fewer; each is compared on some rank."""
    with logged_warnings() as warnings:
        try:
            rest = load_and_finish(case, dtype_of(case), folder)
        except Refused as error:
            return Outcome("refused", str(error), warnings=tuple(warnings))
    own = begun[dist.get_rank() :: dist.get_world_size()] or begun[:1]
    curves = [first.before(rest) for first in own]
    return compared(case, curves, [], share, tuple(warnings))


def dtype_of(case: Case) -> torch.dtype:
    """Of the weights that are given. DeepSpeed sums no gradients in float64 without ZeRO, and
    autocast leaves float64 as it is."""
    is_32 = case.way == "zero 0" or case.precision != "float64" or case.autocast
    return torch.float32 if is_32 else torch.float64


def compared(
    case: Case, curves: Sequence[Curve], masks: list[Any], share: float, warnings: tuple[str, ...]
) -> Outcome:
    dtype = dtype_of(case)
    exact = one_process(replace(case, autocast=False), torch.float64, masks)
    bounds = bounds_of(case, dtype, masks, exact)
    found = [each for curve in curves for each in differences(curve, exact)]
    wrong = [f"{k} {n}: {d:.1e} > {bounds[k]:.0e}" for k, n, d in found if not d <= bounds[k]]
    replicas = curves[0].replicas
    if not wrong and replicas != "all equal":
        worst = max(far / bounds[kind] for kind, _, far in found)
        wrong = [f"{replicas}; all else is within {worst:.0e} of its bound"]
        return Outcome("differs", wrong[0], share, warnings)
    if not wrong:
        return Outcome("same", "", share, warnings)
    nudged = one_process(replace(case, autocast=False), torch.float64, masks, nudge=NUDGE)
    if any(not far <= BOUND for _, _, far in differences(nudged, exact)):
        return Outcome("unstable", "; ".join(wrong[:8]), share, warnings)
    return Outcome("differs", "; ".join(wrong[:8]), share, warnings)


def bounds_of(case: Case, dtype: torch.dtype, masks: list[Any], exact: Curve) -> dict[str, float]:
    """How far each kind of number may be from ``exact``: by what float64 rounds, or by a multiple
    of how far one process is from it that rounds as the sharded run does."""
    bounds = dict.fromkeys(("loss", "norm", "gradient", "weight"), BOUND)
    for noisy in noisy_runs(case, dtype, masks):
        for kind, _, far in differences(noisy, exact):
            # One rounding to float32 is there in any case, as in a norm that is one number.
            bounds[kind] = max(bounds[kind], MARGIN * max(far, 2.0**-24))
        # The norm of one run may be near by chance, where its gradients are not.
        for own, full in zip(noisy.gradients, exact.gradients, strict=True):
            bounds["norm"] = max(bounds["norm"], MARGIN * far_apart(own, full))
    return bounds


def noisy_runs(case: Case, dtype: torch.dtype, masks: list[Any]) -> Iterator[Curve]:
    """One process that rounds as the sharded run does, in each way in which that one does."""
    if case.precision == "bfloat16":
        yield one_process(case, torch.bfloat16, masks)
        return
    if case.autocast:
        yield one_process(case, dtype, masks)
    elif dtype == torch.float32 or case.family:  # some families cast to float32 on the way
        yield one_process(case, torch.float32, masks)
    if case.way in ("zero 1", "zero 2", "zero 3"):
        yield one_process(case, dtype, masks, rounds=True)


def far_apart(own: Gradients, full: Gradients) -> float:
    """The distance of two gradients of all parameters, relative to the norm of the second."""
    square = sum(float((own[n].double() - g).square().sum()) for n, g in full.items())
    total = sum(float(g.square().sum()) for g in full.values())
    return math.sqrt(square / total) if total else 0.0


def one_process(
    case: Case, dtype: torch.dtype, masks: list[Any], *, rounds: bool = False, nudge: float = 0.0
) -> Curve:
    # A recomputation would take the masks of what comes next.
    case = replace(case, checkpointing="") if masks else case
    model = make(case, dtype)
    if case.lora:
        model = add_lora(case, model, lora_targets(case, model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + nudge
    return train_unsharded(case, model, masks or None, rounds=rounds)


def differences(got: Curve, wanted: Curve) -> Iterator[tuple[str, str, float]]:
    """What is compared: kind, name, distance relative to its size."""
    for step, (a, b) in enumerate(zip(got.losses, wanted.losses, strict=True)):
        yield "loss", f"of step {step}", relative(a, b)
    if wanted.evaluated < torch.finfo(torch.float32).max:  # beyond it there is none in float32
        yield "loss", "in evaluation", relative(got.evaluated, wanted.evaluated)
    for step, (a, b) in enumerate(zip(got.norms, wanted.norms, strict=True)):
        if a is not None and b is not None:
            yield "norm", f"of step {step}", relative(a, b)
    for step, (own, full) in enumerate(zip(got.gradients, wanted.gradients, strict=True)):
        largest = max((float(g.abs().max()) for g in full.values() if g.numel()), default=0.0)
        for name in sorted(full.keys() | own.keys()):
            zero = torch.zeros((), dtype=torch.float64)
            yield (
                "gradient",
                f"{name} of step {step}",
                distance(own.get(name, zero).double(), full.get(name, zero).double(), largest),
            )
    if got.weights.keys() != wanted.weights.keys():
        yield "weight", f"names {sorted(got.weights.keys() ^ wanted.weights.keys())}", float("inf")
    for name, full in wanted.weights.items():
        own = got.weights.get(name)
        if own is not None:
            yield "weight", name, distance(own.double(), full.double(), 1.0)


def relative(a: float, b: float) -> float:
    """The distance of two numbers, which may both be 0, relative to the second."""
    if b == 0:
        return abs(a)
    return abs(a - b) / abs(b)


def distance(a: Tensor, b: Tensor, largest: float) -> float:
    """Infinite for other shapes."""
    if a.shape != b.shape and a.dim() and b.dim():
        return float("inf")
    size = (max(float(b.abs().max()), FLOOR * largest) if b.numel() else 0.0) or 1.0
    return float((a - b).abs().max()) / size if (a - b).numel() else 0.0
