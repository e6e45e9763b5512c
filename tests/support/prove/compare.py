# SPDX-License-Identifier: Apache-2.0
"""One case on ranks: both runs, and how far they are apart."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
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
# are rounded to float32, as ZeRO does. Both round each number equally often, at other places: in 90
# cases with autocast, bfloat16 and float32 no number was 4 times as far as the furthest of 3 runs.
MARGIN = 5.0
# So often one process computes in that precision: in one run a number may be near by chance.
NOISY = 5
# With a larger bound a gradient that is missing, or is not summed over ranks, could pass.
BLIND = 0.2
# Where one process gives other numbers once its weights change by this part of them, its training
# diverges, and nothing can be compared.
NUDGE = 1e-14


# Kind, name, and when in training.
Key = tuple[str, str, str]
Bounds = dict[Key, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """``kind``: same, blind, refused, differs or unstable; ``share`` of the parameters on a
    rank."""

    kind: str
    text: str = ""
    share: float = 1.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """The distance ``far`` of two numbers or tensors, relative to their size. ``name`` is that of a
    parameter, "" for losses and norms."""

    kind: str
    name: str
    when: str
    far: float

    @property
    def key(self) -> Key:
        """What has one bound: a parameter's gradient in a step, all losses."""
        return self.kind, self.name, self.when if self.kind in ("gradient", "norm") else ""

    @property
    def own_key(self) -> Key:
        return self.kind, self.name, self.when

    def __str__(self) -> str:
        return " ".join(each for each in (self.kind, self.name, self.when) if each)


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
    exact = one_process(replace(case, autocast=False), torch.float64, masks)
    bounds = bounds_of(case, dtype_of(case), masks, exact)
    found = [each for curve in curves for each in differences(curve, exact)]
    wrong = [each for each in found if each.far > allowed(bounds, each)]
    text = "; ".join(f"{d}: {d.far:.1e} > {allowed(bounds, d):.0e}" for d in wrong[:8])
    replicas = curves[0].replicas
    if wrong:
        nudged = one_process(replace(case, autocast=False), torch.float64, masks, nudge=NUDGE)
        diverges = any(each.far > BOUND for each in differences(nudged, exact))
        return Outcome("unstable" if diverges else "differs", text, share, warnings)
    if replicas != "all equal":
        worst = max(each.far / allowed(bounds, each) for each in found)
        text = f"{replicas}; all else is within {worst:.0e} of its bound"
        return Outcome("differs", text, share, warnings)
    unseen = blind_to(bounds, exact)
    return Outcome("blind" if unseen else "same", "; ".join(unseen[:8]), share, warnings)


def blind_to(bounds: Bounds, exact: Curve) -> list[str]:
    """What is bounded too widely in all steps; in the first, weights are not yet apart. What is 0
    but for rounding cannot be missing: as the gradient of a bias of keys, which is noise alone."""
    nothing = replace(exact, gradients=[{} for _ in exact.gradients])
    missing = {each.key: each.far for each in differences(nothing, exact)}
    least: dict[str, float] = {}
    for key, bound in bounds.items():
        if key[0] != "gradient" or missing.get(key, 1.0) > BOUND:
            name = f"{key[0]} {key[1]}"
            least[name] = min(least.get(name, bound), bound)
    unseen = [f"{name}: {bound:.1e}" for name, bound in least.items() if bound > BLIND]
    return [f"{len(unseen)} of {len(least)}", *unseen] if unseen else []


def allowed(bounds: Bounds, each: Difference) -> float:
    bound = bounds.get(each.key, BOUND)  # one process does not have all names
    return bounds.get(each.own_key, bound)


def bounds_of(case: Case, dtype: torch.dtype, masks: list[Any], exact: Curve) -> Bounds:
    """How far each kind of number of each parameter may be from ``exact``; infinitely far where one
    process has no finite number in this precision."""
    noise: Bounds = {each.key: 0.0 for each in differences(exact, exact)}
    is_noisy = False
    for noisy in noisy_runs(case, dtype, masks):
        is_noisy = True
        for each in [*differences(noisy, exact), *directions(noisy, exact)]:
            key = each.key if math.isfinite(each.far) else each.own_key
            noise[key] = max(noise.get(key, 0.0), each.far)
    return widened(noise) if is_noisy else dict.fromkeys(noise, BOUND)


def directions(noisy: Curve, exact: Curve) -> Iterator[Difference]:
    """For norms: that of one run may be near by chance, where its gradients are not."""
    for step, (own, full) in enumerate(zip(noisy.gradients, exact.gradients, strict=True)):
        yield Difference("norm", "", f"of step {step}", known(far_apart(own, full)))


def widened(noise: Bounds) -> Bounds:
    """Bounds from how far one process is from float64 that rounds as the sharded run does.

    One for each parameter and step, so that a noisy one hides no error in another. A parameter of
    few elements may be near by chance: each bound is at least that of the median of its kind. One
    rounding to float32 is there in any case, as in a norm that is one number.
    """
    groups: dict[tuple[str, str], list[float]] = {}
    for (kind, _, when), far in noise.items():
        groups.setdefault((kind, when), []).append(far)
    usual = {group: middle(values) for group, values in groups.items()}
    return {
        key: max(BOUND, MARGIN * max(far, usual[key[0], key[2]], 2.0**-24))
        for key, far in noise.items()
    }


def middle(noise: Iterable[float]) -> float:
    return median([far for far in noise if math.isfinite(far)] or [0.0])


def noisy_runs(case: Case, dtype: torch.dtype, masks: list[Any]) -> Iterator[Curve]:
    """One process that rounds as the sharded run does, in each way in which that one does, and a
    few times: with weights that are a rounding apart, after which all is rounded elsewhere."""
    in_16_bits = case.precision == "bfloat16" or case.autocast
    for number in range(NOISY):
        nudge = (2.0**-8 if in_16_bits else 2.0**-23) if number else 0.0
        if case.precision == "bfloat16":
            yield one_process(case, torch.bfloat16, masks, nudge=nudge, drawn=number)
            continue
        if case.autocast:
            yield one_process(case, dtype, masks, nudge=nudge, drawn=number)
        elif dtype == torch.float32 or case.family:  # some families cast to float32 on the way
            yield one_process(case, torch.float32, masks, nudge=nudge, drawn=number)
        if case.way in ("zero 1", "zero 2", "zero 3"):
            yield one_process(case, dtype, masks, rounds=True, nudge=nudge, drawn=number)


def far_apart(own: Gradients, full: Gradients) -> float:
    """The distance of two gradients of all parameters, relative to the norm of the second."""
    square = sum(float((own[n].double() - g).square().sum()) for n, g in full.items())
    total = sum(float(g.square().sum()) for g in full.values())
    return math.sqrt(square / total) if total else 0.0


def one_process(
    case: Case,
    dtype: torch.dtype,
    masks: list[Any],
    *,
    rounds: bool = False,
    nudge: float = 0.0,
    drawn: int = 0,
) -> Curve:
    """``nudge``: its weights are at first larger or smaller by this part of them, as ``drawn``
    says, and at the end smaller or larger by as much."""
    # A recomputation would take the masks of what comes next.
    case = replace(case, checkpointing="") if masks else case
    model = make(case, dtype)
    if case.lora:
        model = add_lora(case, model, lora_targets(case, model))
    if not nudge:
        return train_unsharded(case, model, masks or None, rounds=rounds)
    before = {name: each.double().clone() for name, each in model.state_dict().items()}
    nudge_weights(model, nudge, drawn)
    shifts = {n: each.double() - before[n] for n, each in model.state_dict().items()}
    curve = train_unsharded(case, model, masks or None, rounds=rounds)
    curve.weights = {n: each.double() - shifts[n] for n, each in curve.weights.items()}
    return curve


@torch.no_grad()
def nudge_weights(model: torch.nn.Module, nudge: float, drawn: int) -> None:
    draw = torch.Generator().manual_seed(drawn)
    for parameter in model.parameters():
        signs = 2 * torch.randint(2, parameter.shape, generator=draw) - 1
        parameter += nudge * signs * parameter


def differences(got: Curve, wanted: Curve) -> Iterator[Difference]:
    """What is compared."""
    for step, (a, b) in enumerate(zip(got.losses, wanted.losses, strict=True)):
        yield Difference("loss", "", f"of step {step}", relative(a, b))
    if wanted.evaluated < torch.finfo(torch.float32).max:  # beyond it there is none in float32
        yield Difference("loss", "", "in evaluation", relative(got.evaluated, wanted.evaluated))
    for step, (a, b) in enumerate(zip(got.norms, wanted.norms, strict=True)):
        if a is not None and b is not None:
            yield Difference("norm", "", f"of step {step}", relative(a, b))
    for step, (own, full) in enumerate(zip(got.gradients, wanted.gradients, strict=True)):
        largest = max((float(g.abs().max()) for g in full.values() if g.numel()), default=0.0)
        for name in sorted(full.keys() | own.keys()):
            zero = torch.zeros((), dtype=torch.float64)
            far = distance(own.get(name, zero).double(), full.get(name, zero).double(), largest)
            yield Difference("gradient", name, f"of step {step}", far)
    if got.weights.keys() != wanted.weights.keys():
        names = f"names {sorted(got.weights.keys() ^ wanted.weights.keys())}"
        yield Difference("weight", "", names, float("inf"))
    for name, full in wanted.weights.items():
        own = got.weights.get(name)
        if own is not None:
            yield Difference("weight", name, "", distance(own.double(), full.double(), 1.0))


def relative(a: float, b: float) -> float:
    """The distance of two numbers, which may both be 0, relative to the second."""
    if b == 0:
        return known(abs(a))
    return known(abs(a - b) / abs(b))


def distance(a: Tensor, b: Tensor, largest: float) -> float:
    """Infinite for other shapes."""
    if a.shape != b.shape and a.dim() and b.dim():
        return float("inf")
    size = (max(float(b.abs().max()), FLOOR * largest) if b.numel() else 0.0) or 1.0
    return known(float((a - b).abs().max()) / size) if (a - b).numel() else 0.0


def known(far: float) -> float:
    """Infinite for NaN, which no maximum and no bound passes over."""
    return math.inf if math.isnan(far) else far
