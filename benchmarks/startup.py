# SPDX-License-Identifier: Apache-2.0
"""What starting costs with the number of ranks: ``python -m benchmarks.startup --ranks 2,4,8,16``.

Ranks of this machine shard a small Llama over TP groups of 2 ranks, by ``parallelize`` and by
``initialize``, and meet over gloo. Printed are the exchanges over all ranks that this package
makes, the bytes that a rank gives to one and is given by it, the seconds of the slowest rank in
them and altogether, and the collectives over all ranks, of which the engine's own are a part. The
last lines are straight lines through the least seconds of an exchange, ``fixed + each * ranks``,
and what they would come to far outside of what was measured. Of 2 ranks the exchanges of the TP
group are counted, too, and they are not in the lines.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import deepspeed_autotp
from benchmarks.step_calls import GLOO, Recorder
from deepspeed_autotp.distributed.consensus import Agreement
from tests.support import forked_ranks

TP = 2
FAR = (1024, 16384)
TIMEOUT = 300.0


@dataclass(slots=True)
class Start:
    """One rank's start: ``sent`` and ``seconds`` of each exchange over all ranks, the seconds
    ``altogether``, and the ``collectives`` over all ranks with their bytes."""

    sent: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    altogether: float = 0.0
    collectives: int = 0
    nbytes: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="2,4,8,16", help="numbers of ranks, multiples of 2")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sizes = [int(size) for size in options.ranks.split(",")]
    print(f"{'':12} ranks exchanges  bytes of a rank   given  seconds in them  altogether", end="")
    print("   collectives  bytes")
    for name, work in (("parallelize", _parallelize), ("initialize", _initialize)):
        least: list[float] = []
        for ranks in sizes:
            rounds = [_measured(work, ranks) for _ in range(options.rounds)]
            least.append(min(_each(starts) for starts in rounds))
            _print(name, ranks, min(rounds, key=lambda starts: _slowest(starts).altogether))
        if len(sizes) > 2:  # of 2 ranks the only TP group is all ranks
            _extrapolate(name, sizes[1:], least[1:], len(rounds[0][0].sent))


def _measured(work: Callable[[], object], ranks: int) -> list[Start]:
    def start() -> Start:
        torch.set_num_threads(1)
        rank, world = str(dist.get_rank()), str(dist.get_world_size())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
        with _counted() as found:
            work()
        dist.barrier()
        return found

    return forked_ranks.run(start, ranks=ranks, timeout=TIMEOUT)


@contextmanager
def _counted() -> Iterator[Start]:
    found, world = Start(), dist.get_world_size()
    exchange = Agreement.exchange

    def counted(agreement: Agreement, mine: object) -> object:
        began = time.perf_counter()
        everyone = exchange(agreement, mine)
        if len(agreement.ranks) == world:
            found.sent.append(len(pickle.dumps(mine)))
            found.seconds.append(time.perf_counter() - began)
        return everyone

    dist.barrier()
    began = time.perf_counter()
    with Recorder() as recorder, mock.patch.object(Agreement, "exchange", counted):
        yield found
    found.altogether = time.perf_counter() - began
    of_all = [c for c in recorder.calls if c.transport == GLOO and c.ranks == world]
    found.collectives, found.nbytes = len(of_all), sum(call.size for call in of_all)


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_attention_heads=4, **sizes))


def _parallelize() -> None:
    deepspeed_autotp.parallelize(_model(), tp_size=TP)


def _initialize() -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "tensor_parallel": {"autotp_size": TP},
    }
    # DeepSpeed's operator for the ranks of one host takes minutes to compile.
    with mock.patch.dict(deepspeed.ops.__compatible_ops__, {"deepspeed_shm_comm": False}):
        deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)


def _slowest(starts: Sequence[Start]) -> Start:
    return max(starts, key=lambda start: start.altogether)


def _each(starts: Sequence[Start]) -> float:
    """Seconds of the quickest exchange: one in which no rank came late."""
    return min(
        max(start.seconds[index] for start in starts) for index in range(len(starts[0].sent))
    )


def _print(name: str, ranks: int, starts: Sequence[Start]) -> None:
    start = _slowest(starts)
    given = sum(sum(each.sent) for each in starts)
    inside = max(sum(each.seconds) for each in starts)
    largest = max(start.sent)
    print(
        f"{name:12} {ranks:5} {len(start.sent):9} {sum(start.sent):8} (<={largest:5}) {given:7} "
        f"{inside:16.3f} {start.altogether:11.2f} {start.collectives:13} {start.nbytes:6}"
    )


def _extrapolate(name: str, sizes: Sequence[int], least: Sequence[float], exchanges: int) -> None:
    each, fixed = statistics.linear_regression(sizes, least)
    line = f"{1000 * fixed:.1f} ms + {1000 * each:.2f} ms * ranks"
    print(f"{name}: one exchange takes {line}, of which there are {exchanges}")
    for ranks in FAR:
        print(f"{name}: extrapolated to {ranks:,} ranks {exchanges * (fixed + each * ranks):.0f} s")


if __name__ == "__main__":
    main()
