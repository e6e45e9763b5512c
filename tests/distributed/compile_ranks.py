# SPDX-License-Identifier: Apache-2.0
"""A sharded model under torch.compile."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import deepspeed_autotp
from tests.support.loss_curves import single_losses
from tests.support.small_models import build

STEPS = 3


def _counting(into: Counter[str]) -> Callable[..., Any]:
    """A compiler that runs the graph as it is and counts its collectives."""

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if "_c10d_functional" in str(node.target):
                into[str(node.target).split(".")[1]] += 1
        return graph

    return compile_graph


def train(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Losses of one process and of the compiled model, graphs, breaks and collectives."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.utils import counters

    expected = single_losses(build(family, tied=False, **changes), clip=0.0, steps=STEPS)
    model = build(family, tied=False, **changes)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    torch._dynamo.reset()
    counters.clear()
    backend = aot_autograd(fw_compiler=_counting(forward), bw_compiler=_counting(backward))
    try:
        losses = single_losses(torch.compile(model, backend=backend), clip=0.0, steps=STEPS)
        return {
            "apart": max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)),
            "breaks": dict(counters["graph_break"]),
            "graphs": counters["stats"]["unique_graphs"],
            "forward": dict(forward),
            "backward": dict(backward),
        }
    finally:
        torch._dynamo.reset()
