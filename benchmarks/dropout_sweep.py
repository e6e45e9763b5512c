# SPDX-License-Identifier: Apache-2.0
"""Train every causal language model of transformers sharded and with dropout, compare replicas.

    python -m benchmarks.dropout_sweep --tp 3

Each model type of transformers is shrunk (benchmarks/shrink.py), every dropout probability set to
0.1, and trained for a few SGD steps. A dropout mask that is a rank's own where all ranks have one
activation lets replicated parameters drift, which ``check_replicas`` finds.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from benchmarks.shrink import MODEL_TYPES, batch, build, example_inputs
from tests.support.worker_pool import Pool, PoolError

RATE = 0.1
STEPS = 3
# Layers that are dropped, and what is no probability.
_OTHERS = ("layerdrop", "layer_drop", "drop_path", "embedding_dropout_position")


def set_dropout(model: nn.Module) -> None:
    """Set the probabilities of modules, their attributes and their configurations."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = RATE
        config = vars(module).get("config")
        for values in (vars(module), {} if config is None else vars(config)):
            for key, value in list(values.items()):
                if "drop" in key and key not in _OTHERS and isinstance(value, float):
                    values[key] = RATE


def measure(model_type: str) -> str:
    """ "equal" where the replicas are, also of the RNG state, or what went wrong."""
    try:
        model = build(model_type)
        set_dropout(model)
        model(**batch(model_type, 0)).loss.backward()
    except Exception as error:
        return f"unable: {error}"
    model.zero_grad()
    inputs = example_inputs(model_type)
    try:
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), example_inputs=inputs)
    except ValueError as error:
        return f"refused: {error}"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        model(**batch(model_type, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    try:
        deepspeed_autotp.check_replicas(model)
    except RuntimeError as error:
        return f"differs: {error}"
    draws: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(draws, float(torch.rand(())))
    return "equal" if len(set(draws)) == 1 else "differs: the RNG states"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, default=2, help="TP size")
    parser.add_argument("--only", help="model types, separated by commas")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else MODEL_TYPES
    pool = Pool(options.tp)
    counts: Counter[str] = Counter()
    try:
        for name in names:
            try:
                (said, *others) = pool.run(
                    "benchmarks.dropout_sweep:measure", name, ranks=options.tp, timeout=120
                )
                said = said if all(other == said for other in others) else f"differs: {others}"
            except PoolError as error:
                said = f"crashed: {error}".splitlines()[0]
            counts[said.partition(":")[0]] += 1
            print(f"{name:28} {said[:160]}", flush=True)
    finally:
        pool.close()
    print(f"TP {options.tp}: {dict(counts)}")


if __name__ == "__main__":
    main()
