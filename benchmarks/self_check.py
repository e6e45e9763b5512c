# SPDX-License-Identifier: Apache-2.0
"""What the self-check of Llamas of 1, 8 and 70 billion parameters costs, on their twins.

    python -m benchmarks.self_check

The models are on the meta device, so that none of them is ever there. A row gives what it costs to
make the plan and agree on it, to find the small model that stands for the large one, and to compare
it unsharded and sharded over two ranks on gloo. Time and memory are those of the slowest and of the
largest rank; the targets are 3 s and 300 MiB.
"""

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.shard import memory
from deepspeed_autotp.api.checked_plan import plan_to_check
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.distributed.consensus import world_agreement
from deepspeed_autotp.distributed.owned_groups import OwnedGroups
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.planning.model_description import describe
from deepspeed_autotp.sharding.weight_location import WeightLocation
from tests.support.worker_pool import Pool

TARGET_S, TARGET_MIB = 3.0, 300.0
RANKS = 2
MODELS: dict[str, dict[str, Any]] = {
    "1 billion": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8 billion": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70 billion": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
VOCABULARY = 128256


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one rank: seconds, bytes, and the parameters of the model and of its twin."""

    seconds: float
    bytes: int
    parameters: int
    small: int


def measure(name: str) -> Cost:
    """The cost of the plan and the self-check of a model, on this rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **MODELS[name]))
    settings = TPTrainingConfig(autotp_size=RANKS)
    agreement = world_agreement(OwnedGroups())
    assert dist.group.WORLD is not None
    group = TPGroup(dist.group.WORLD)
    group.share_memory()
    before = memory("VmRSS")
    began = time.perf_counter()
    description = describe(model)
    to_check = plan_to_check(
        description,
        settings,
        None,
        None,
        ranks=RANKS,
        agreement=agreement,
        location=WeightLocation(torch.device("cpu"), only_on_rank0=True),
    ).result
    assert to_check.twin is not None
    plan, _ = to_check.checked(description, settings, group=group, agreement=agreement)
    seconds = time.perf_counter() - began
    assert plan is to_check.plan
    peak = memory("VmHWM")
    small = to_check.twin.description.modules[""]
    return Cost(seconds, peak - before, _size(model), _size(small))


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    table = Table(title=f"TP {RANKS}; targets {TARGET_S:.0f} s and {TARGET_MIB:.0f} MiB")
    for heading in ("Llama", "parameters", "of its twin", "seconds", "MiB"):
        table.add_column(heading, justify="right")
    for name in MODELS:
        pool = Pool(RANKS)  # new processes, for the peak of their memory
        try:
            costs: list[Cost] = pool.run("benchmarks.self_check:measure", name, ranks=RANKS)
        finally:
            pool.close()
        table.add_row(
            name,
            f"{costs[0].parameters:,}",
            f"{costs[0].small:,}",
            f"{max(cost.seconds for cost in costs):.2f}",
            f"{max(cost.bytes for cost in costs) / 2**20:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
