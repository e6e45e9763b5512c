# SPDX-License-Identifier: Apache-2.0
"""What several ranks hold, compared now and then while a model trains.

Each rank updates its replicated parameters. The gradients are those of equal activations,
but libraries may round a product otherwise in another process, and kernels that add atomically do
so in every call; then the ranks' values part slowly. Megatron-LM averages such gradients over the
TP ranks for modules of Hugging Face; here the ranks look, which costs nothing where they are equal.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.interop.deepspeed.parameters import is_partitioned, own_partition
from deepspeed_autotp.interop.fully_shard import fully_sharded_modules
from deepspeed_autotp.interop.torch_private import hooked_once
from deepspeed_autotp.state.comparison_hook import ComparisonHook
from deepspeed_autotp.state.replica_check import RunKey, described, runs_of_several
from deepspeed_autotp.state.sharded_model import TensorParallel, find_tensor_parallel

_log = logging.getLogger("deepspeed_autotp")

# Elements whose bits are looked at together, which takes 16 bytes for each.
_PART = 1 << 22
# Elements of a tensor that say how far the ranks are apart, or up to twice as many.
_SAMPLE = 1024
# A relative difference that is none.
_TINY = torch.finfo(torch.float32).tiny
# Of the largest of them; beyond it the ranks train different models.
_MOST = 1e-2
_ROUND_ALIKE = (
    "let their libraries round alike: MKL_CBWR=COMPATIBLE in the environment on CPUs, "
    "torch.use_deterministic_algorithms(True) on GPUs"
)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class CompareReplicas(ComparisonHook):
    """In calls 4, 8, 16, ... the ranks compare what several of them hold.

    One warning where it differs, and another one when the difference has grown tenfold;
    RuntimeError on every rank where it is above a hundredth of the largest value. Not with
    ``fully_shard``.
    """

    def __init__(self) -> None:
        super().__init__(first=4)
        self._warned = 0.0

    @torch.no_grad()
    def compare(self, module: nn.Module, *, call: int) -> None:
        state = find_tensor_parallel(module)
        if state is None or fully_sharded_modules(module):
            return
        held = dict(_held_by_several(state))
        differing = _differing(state, _checksums(held))
        if not differing:
            return
        agreement = Agreement(state.group.cpu_handle)
        samples = agreement.exchange({key: _sample(held[key]) for key in differing if key in held})
        apart = max(_apart([each[key] for each in samples if key in each]) for key in differing)
        differ, names = described(differing)
        far = f"by up to {apart:.1e} of the largest value" if apart else "in values not sampled"
        what = (
            f"{differ} {far} between the ranks {list(state.group.global_ranks)} of the TP group of "
            f"{type(module).__name__} in call {call}: {names}"
        )
        if apart > _MOST:
            raise RuntimeError(
                f"{what}; update what several ranks hold in the same way on each of them, and "
                f"{_ROUND_ALIKE}"
            )
        if apart >= 10 * self._warned and state.group.rank == 0:
            _log.warning("%s; the ranks round otherwise: %s", what, _ROUND_ALIKE)
        self._warned = max(self._warned, apart, _TINY)


def compare_replicas(state: TensorParallel) -> None:
    """Let the ranks of a sharded model compare what several of them hold from now on."""
    state.hook(hooked_once(CompareReplicas()))


def _held_by_several(state: TensorParallel) -> Iterator[tuple[RunKey, Tensor]]:
    """The values that this rank has of them; of what ZeRO 3 has partitioned those of its part,
    which is the same part on all ranks of a TP group."""
    rank = state.group.rank
    for entry, parameter in zip(state.plan.entries, state.parameters, strict=True):
        if entry.is_tied:
            continue
        if not entry.is_sharded:
            yield from runs_of_several(entry, rank, own_partition(parameter).detach())
        elif not is_partitioned(parameter):
            yield from runs_of_several(entry, rank, parameter.detach())


def _checksums(held: dict[RunKey, Tensor]) -> dict[RunKey, int]:
    if not held:
        return {}
    sums = torch.stack([checksum(values) for values in held.values()])
    return dict(zip(held, sums.tolist(), strict=True))


def checksum(values: Tensor) -> Tensor:
    """Of the bits of ``values``: equal for equal ones, and hardly ever for others."""
    whole = values.reshape(-1).view(_INTEGERS[values.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for part in whole.split(_PART):
        bits = part.to(torch.int64)
        if values.itemsize >= 8:  # or their sign, the 64th bit, would be lost in the square
            bits = bits ^ (bits >> 32)
        total += (bits * bits).sum()  # what is beyond 64 bits is dropped
    return total


def _differing(state: TensorParallel, own: dict[RunKey, int]) -> list[RunKey]:
    """What has other checksums on other ranks. All ranks call it."""
    keys = list(dict.fromkeys(_keys(state)))
    rows = [[key in own, own.get(key, 0)] for key in keys]
    sent = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 2)
    everyone = torch.stack(state.group.all_gather(sent, [sent.shape] * state.group.size))
    by_key = zip(keys, everyone.unbind(1), strict=True)
    return [key for key, of in by_key if len(set(of[of[:, 0] > 0, 1].tolist())) > 1]


def _keys(state: TensorParallel) -> Iterator[RunKey]:
    """Those of all ranks, in the same order on each."""
    for entry in state.plan.entries:
        if not entry.is_sharded:
            yield (entry.name, 0, 0)
            continue
        for rank in range(state.group.size):
            for index, (_, _, owner, _) in enumerate(entry.shared(rank)):
                yield (entry.name, owner, index)


def _sample(values: Tensor) -> Tensor:
    flat = values.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", torch.float64)


def _apart(samples: list[Tensor]) -> float:
    """The largest difference from the first, as a part of its largest value; infinite where a value
    is not finite on one of the ranks."""
    first, others = samples[0], torch.stack(samples[1:])
    is_same = (others == first) | (others.isnan() & first.isnan())
    apart = (others - first).abs().masked_fill(is_same, 0.0)
    if not apart.isfinite().all():
        return math.inf
    largest = first.nan_to_num(0.0, 0.0, 0.0).abs().max()
    return float(apart.max()) / max(float(largest), _TINY)
