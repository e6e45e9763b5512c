# SPDX-License-Identifier: Apache-2.0
"""What a sharded layer costs on the CPU over nn.Linear of the same size: time and autograd nodes.

    python -m benchmarks.layers

The layers are so small that a call is all overhead, and torch's fake process group, which returns
at once, stands in for the other rank. Processor time of this thread; both sides take turns in one
process, and medians over the repeats are shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import deepspeed_autotp

FEATURES, TOKENS, RANKS = 16, 8, 2
MICRO = 1e6


class Layers(nn.Module):
    """Two column layers of one input, one of its own, and a row layer behind them."""

    def __init__(self, *, bias: bool, inner: int) -> None:
        super().__init__()
        self.gate, self.up, self.alone = (nn.Linear(FEATURES, inner, bias=bias) for _ in range(3))
        self.down = nn.Linear(inner, FEATURES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.gate(x) + self.up(x) + self.alone(x.clone()))
        return y


@dataclass(frozen=True, slots=True)
class Case:
    """``run`` calls layers with ``x``, whose last dimension is ``width``."""

    run: Callable[[Tensor], tuple[Tensor, ...]]
    layers: int
    width: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds of one call of a layer, and autograd nodes that it adds."""

    forward: float
    backward: float
    nodes: float


def sharded(*, bias: bool) -> Layers:
    """The layers as one of ``RANKS`` ranks has them. The process has a group of that size."""
    rules = [
        {"patterns": [r"(gate|up|alone)\.weight"], "partition_type": "column"},
        {"patterns": [r"down\.weight"], "partition_type": "row"},
    ]
    config = {
        "partition_config": {"use_default_specs": False, "layer_specs": rules},
        "self_check": False,
    }
    model = Layers(bias=bias, inner=FEATURES)
    deepspeed_autotp.parallelize(model, tp_size=RANKS, config=config)
    return model


def cases(model: Layers) -> Mapping[str, Case]:
    return {
        "column, input of its own": Case(lambda x: (model.alone(x),), 1, FEATURES),
        "column, two of one input": Case(lambda x: (model.gate(x), model.up(x)), 2, FEATURES),
        "row": Case(lambda x: (model.down(x),), 1, FEATURES // RANKS),
    }


def example(width: int) -> Tensor:
    """Hidden states in the middle of a model: [rows, tokens, features] with a gradient."""
    return torch.randn(1, TOKENS, width).requires_grad_() * 1


def nodes_added(case: Case) -> float:
    """Autograd nodes of one layer, those of its parameters left out."""
    x = example(case.width)
    open_nodes = [y.grad_fn for y in case.run(x)]
    seen: set[object] = {x.grad_fn}
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen and not node.name().endswith("AccumulateGrad"):
            seen.add(node)
            open_nodes.extend(before for before, _ in node.next_functions)
    return (len(seen) - 1) / case.layers


def measure(case: Case, *, calls: int) -> Figures:
    """Means over ``calls`` calls."""
    forward = backward = 0.0
    for _ in range(calls):
        x = example(case.width)
        began = time.thread_time()
        outputs = case.run(x)
        forward += time.thread_time() - began
        gradients = [torch.ones_like(y) for y in outputs]
        began = time.thread_time()
        torch.autograd.backward(outputs, gradients)
        backward += time.thread_time() - began
    total = calls * case.layers
    return Figures(forward / total, backward / total, nodes_added(case))


def medians(figures: list[Figures]) -> Figures:
    return Figures(
        statistics.median(each.forward for each in figures),
        statistics.median(each.backward for each in figures),
        figures[0].nodes,
    )


def compare(bias: bool, *, calls: int, repeats: int) -> Mapping[str, tuple[Figures, Figures]]:
    """For each case our figures and nn.Linear's."""
    ours = cases(sharded(bias=bias))
    plain = cases(Layers(bias=bias, inner=FEATURES // RANKS))
    found: dict[str, tuple[list[Figures], list[Figures]]] = {name: ([], []) for name in ours}
    for _ in range(repeats + 1):
        for name, (own, theirs) in found.items():
            own.append(measure(ours[name], calls=calls))
            theirs.append(measure(plain[name], calls=calls))
    # The first turn warms up.
    return {name: (medians(own[1:]), medians(theirs[1:])) for name, (own, theirs) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    table = Table(title="one call of a layer / of nn.Linear: microseconds and autograd nodes")
    for column in ("layer", "forward", "backward", "nodes"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for bias in (False, True):
        compared = compare(bias, calls=options.calls, repeats=options.repeats)
        for name, (own, plain) in compared.items():
            table.add_row(
                f"{name}{', bias' if bias else ''}",
                f"{own.forward * MICRO:.1f} / {plain.forward * MICRO:.1f}",
                f"{own.backward * MICRO:.1f} / {plain.backward * MICRO:.1f}",
                f"{own.nodes:g} / {plain.nodes:g}",
            )
    Console().print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
