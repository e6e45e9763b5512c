# SPDX-License-Identifier: Apache-2.0
"""A rank's shard of an embedding over the vocabulary, on a CPU: the lookup and its gradient
over F.embedding with the other ranks' rows masked.

    python -m benchmarks.lookup

Processor time of one thread; both sides take turns in one process, and medians over the repeats are
shown. The gradient is as large as the rank's weight: most of its time goes into new memory, which
either side pays for.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deepspeed_autotp.layers.embedding_lookup import lookup


def masked(weight: Tensor, ids: Tensor, start: int) -> Tensor:
    """All tokens are looked up, those of other ranks in row 0, and zeros replace these."""
    elsewhere = (ids < start) | (ids >= start + len(weight))
    local = (ids - start).masked_fill_(elsewhere, 0)
    return F.embedding(local, weight).masked_fill(elsewhere.unsqueeze(-1), 0)


def turns(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> list[tuple[float, float]]:
    """Seconds of both in each turn, after one that loads code and fills caches."""
    found = []
    for index in range(repeats + 1):
        took = []
        for run in (ours, theirs) if index % 2 else (theirs, ours):
            began = time.thread_time()
            run()
            took.append(time.thread_time() - began)
        found.append((took[0], took[1]) if index % 2 else (took[1], took[0]))
    return found[1:]


def rows(options: argparse.Namespace) -> Iterator[list[str]]:
    for features in options.features:
        for ranks in options.ranks:
            for dtype in (torch.float32, torch.bfloat16):
                held = options.vocabulary // ranks
                name = f"[{options.tokens}, {features}] of {held} rows, {ranks} ranks, "
                yield [
                    name + str(dtype).removeprefix("torch."),
                    *figures(options, dtype, features, ranks),
                ]


def figures(
    options: argparse.Namespace, dtype: torch.dtype, features: int, ranks: int
) -> list[str]:
    """Milliseconds of ours and the ratio to theirs, forward and backward."""
    held = options.vocabulary // ranks
    weight = torch.randn(held, features).to(dtype).requires_grad_()
    ids = torch.randint(0, options.vocabulary, (options.tokens,))
    dy = torch.randn(options.tokens, features).to(dtype)
    ways: tuple[Callable[[], Tensor], Callable[[], Tensor]] = (
        lambda: lookup(weight, ids, start=held, size=options.vocabulary),
        lambda: masked(weight, ids, held),
    )
    graphs = [way() for way in ways]
    assert torch.equal(*graphs)
    backward = [lambda y=y: torch.autograd.grad(y, weight, dy, retain_graph=True) for y in graphs]
    shown = []
    for pair in (ways, backward):
        took = turns(pair[0], pair[1], options.repeats)
        ours, theirs = (statistics.median(times) for times in zip(*took, strict=True))
        shown += [f"{ours * 1e3:.2f}", f"{ours / theirs:.2f}"]
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=64000)
    parser.add_argument("--features", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = Table(title=f"ours / masked embedding, one thread, torch {torch.__version__}")
    for name in ("case", "forward ms", "ratio", "backward ms", "ratio"):
        found.add_column(name, justify="left" if name == "case" else "right")
    for row in rows(options):
        found.add_row(*row)
    Console(width=140).print(found)


if __name__ == "__main__":
    main()
