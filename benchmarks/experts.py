# SPDX-License-Identifier: Apache-2.0
"""A training step of a mixture of experts: a shard of every expert, or whole experts, on each rank.

    python -m benchmarks.experts --experts 8 64 256 --tp 2 4

One block of Qwen3-MoE in float32, of as many weights whatever the number of experts; both ways take
turns on the same ranks. Collectives are the same, so the bytes are, too: both sum the output of the
experts, and the gradients of hidden states and routing weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from tests.support.worker_pool import Pool

WAYS = ("width", "experts")
MODULE = "benchmarks.experts"
TIMEOUT = 900.0
VOCABULARY = 256


def build(experts: int, hidden: int, inner: int, chosen: int) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "moe_intermediate_size": inner // experts,
        "num_experts": experts,
        "num_experts_per_tok": min(chosen, experts),
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": hidden // 8,
        "num_hidden_layers": 1,
        "vocab_size": VOCABULARY,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).train()


def measure(
    experts: int, hidden: int, inner: int, chosen: int, tokens: int, repeats: int
) -> dict[str, tuple[float, float, float]]:
    """By way: median seconds of a step, the largest share of the pairs of token and expert that one
    rank has, and MB of expert weights of this rank."""
    models = {}
    for way in WAYS:
        models[way] = build(experts, hidden, inner, chosen)
        section = {"expert_partition": way, "self_check": False}
        deepspeed_autotp.parallelize(models[way], tp_size=dist.get_world_size(), config=section)
    ids = torch.randint(0, VOCABULARY, (1, tokens))
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        for way, model in models.items():
            dist.barrier()
            began = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            dist.barrier()
            if repeat:  # the first one allocates
                times[way].append(time.perf_counter() - began)
            model.zero_grad()
    share = {"width": 1 / dist.get_world_size(), "experts": _largest_share(models["experts"], ids)}
    return {
        way: (statistics.median(times[way]), share[way], _expert_megabytes(models[way]))
        for way in WAYS
    }


def _largest_share(model: nn.Module, ids: torch.Tensor) -> float:
    """Of the pairs of token and expert, of the rank that has most."""
    size = dist.get_world_size()
    seen: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with torch.no_grad():
        model(input_ids=ids)
    plan = deepspeed_autotp.tensor_parallel(model).plan
    entry = next(e for e in plan.entries if e.name.endswith("experts.down_proj"))
    ends = torch.tensor([entry.local_shape(rank)[0] for rank in range(size)]).cumsum(0)
    ranks = torch.bucketize(seen[0].flatten(), ends, right=True)
    return float(torch.bincount(ranks, minlength=size).max() / ranks.numel())


def _expert_megabytes(model: nn.Module) -> float:
    return sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=16384, help="features of all experts together")
    parser.add_argument("--chosen", type=int, default=8, help="experts of a token, at most")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    print("TP  experts  width: s  experts: s  ratio  largest share  MB of experts, one rank")
    with closing(Pool()) as pool:
        for tp in asked.tp:
            for experts in asked.experts:
                sizes = (experts, asked.hidden, asked.inner, asked.chosen)
                arguments = (*sizes, asked.tokens, asked.repeats)
                ranks = pool.run(f"{MODULE}:measure", *arguments, ranks=tp, timeout=TIMEOUT)
                width, whole = ranks[0]["width"], ranks[0]["experts"]
                megabytes = max(found["experts"][2] for found in ranks)
                print(
                    f"{tp:2}  {experts:7}  {width[0]:8.3f}  {whole[0]:10.3f}  "
                    f"{whole[0] / width[0]:5.2f}  {whole[1]:13.2f}  "
                    f"{width[2]:.1f} / {megabytes:.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
