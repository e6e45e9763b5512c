# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism beside what torch offers for the other dimensions of a mesh, as plain data.

``make long`` runs every pair of values of MATRIX in some run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MeshRun:
    """One combination; what is not given changes nothing.

    family      a key of FAMILIES in tests/distributed/meshes_ranks.py
    way         what spreads the model over data-parallel ranks: "ddp", "fsdp" or "hsdp"
    tp_first    the mesh has its TP dimension first, so that TP ranks are not consecutive
    whole       fully_shard was called for the model alone, not for its blocks, too
    reshard     reshard_after_forward of fully_shard
    offload     its CPUOffloadPolicy
    checkpoint  activations: "reentrant", "not reentrant", "wrapper"
    compiled    "blocks", "replaced blocks" (torch.compile of each), "model"
    clip        "ours", "torch", "largest" (torch's with the infinity norm), "value"
    optimizer   a key of OPTIMIZERS there
    accumulate  "each" or "last": which parts of a step reduce gradients
    trained     "half" of the parameters, "lora", or all
    tokens      "sharded" between the blocks, as sequence parallelism does, or on all ranks
    """

    family: str = "llama"
    way: str = "fsdp"
    tp: int = 2
    tp_first: bool = False
    whole: bool = False
    reshard: bool | None = None
    offload: bool = False
    checkpoint: str = ""
    compiled: str = ""
    clip: str = "ours"
    optimizer: str = "momentum"
    accumulate: str = ""
    trained: str = ""
    tokens: str = ""

    @property
    def label(self) -> str:
        """What is not as by default."""
        own, plain = vars(self), vars(MeshRun())
        return ", ".join(f"{k}={own[k]}" for k in own if own[k] != plain[k]) or "plain"


MATRIX: dict[str, list[Any]] = {
    "family": ["llama", "gpt2", "qwen3", "experts"],
    "way": ["fsdp", "ddp", "hsdp"],
    "whole": [False, True],
    "reshard": [None, True, False],
    "offload": [False, True],
    "checkpoint": ["", "reentrant", "not reentrant", "wrapper"],
    "compiled": ["", "blocks", "replaced blocks", "model"],
    "clip": ["ours", "torch", "largest", "value"],
    "optimizer": ["momentum", "AdamW", "AdamW foreach", "AdamW fused"],
    "accumulate": ["", "each", "last"],
    "trained": ["", "half", "lora"],
    "tokens": ["", "sharded"],
}
# A few that have most values once, for every run of the suite.
QUICK = [
    MeshRun(way="hsdp", checkpoint="wrapper", clip="torch", optimizer="AdamW fused"),
    MeshRun(family="gpt2", reshard=False, clip="largest", accumulate="last", tp_first=True),
    MeshRun(family="experts", whole=True, offload=True, checkpoint="reentrant", trained="half"),
    MeshRun(family="qwen3", way="ddp", checkpoint="not reentrant", clip="torch", trained="lora"),
    MeshRun(family="qwen3", tokens="sharded"),
]


def runs_of_pairs() -> list[MeshRun]:
    """Few runs that have every pair of values that go together."""
    left = dict.fromkeys(_pairs_of(MATRIX))
    runs: list[MeshRun] = []
    while left:
        (key, value), (other, its) = next(iter(left))
        chosen: dict[str, Any] = {key: value, other: its}
        for name in MATRIX:
            if name not in chosen:
                chosen[name] = max(
                    MATRIX[name], key=lambda each, n=name: _news(chosen, n, each, left)
                )
        for pair in combinations(chosen.items(), 2):
            left.pop(pair, None)
        run = _possible(MeshRun(**chosen))
        if run not in runs:
            runs.append(run)
    return runs


def _pairs_of(options: Mapping[str, Sequence[Any]]) -> Iterator[Any]:
    for one, other in combinations(options, 2):
        for value in options[one]:
            yield from (((one, value), (other, its)) for its in options[other])


def _news(chosen: Mapping[str, Any], name: str, value: Any, left: Mapping[Any, Any]) -> int:
    """How many pairs ``value`` would add."""
    order = list(MATRIX)
    return sum(
        tuple(sorted(((key, its), (name, value)), key=lambda each: order.index(each[0]))) in left
        for key, its in chosen.items()
    )


def _possible(run: MeshRun) -> MeshRun:
    """The run without what does not apply to the rest of it."""
    if run.way == "ddp":
        run = replace(run, whole=False, reshard=None, offload=False)
    if run.trained == "lora" and run.family == "gpt2":
        run = replace(run, trained="half")  # its names are other ones
    return run
