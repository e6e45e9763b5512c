# SPDX-License-Identifier: Apache-2.0
"""A training step of a mixture of experts: a shard of every expert, or whole experts, on each rank.

    python -m benchmarks.experts --experts 8 64 256 --models mixtral gpt_oss --tp 2 4

One block in float32: of Qwen3-MoE with as many weights whatever the number of experts, and of
several model types. Both ways take turns on the same ranks.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed_autotp
from benchmarks.step_calls import Recorder
from deepspeed_autotp import _core
from tests.support.worker_pool import Pool

WAYS = ("width", "experts")
MODULE = "benchmarks.experts"
TIMEOUT = 900.0
VOCABULARY = 256

# As many experts as in Mixtral 8x7B, Qwen3-30B-A3B, DeepSeek-V3, gpt-oss-20b and Llama 4 Scout, of
# fewer features.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_hidden_layers": 1,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1792},
    "qwen3_moe": {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 192,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        **_LATENT,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 0,
    },
    "gpt_oss": {"num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 512},
    "llama4_text": {
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "intermediate_size": 832,
        "intermediate_size_mlp": 832,
        "moe_layers": [0],
    },
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one way on one rank: ``seconds`` of the fastest forward and backward, ``parameters`` and
    ``experts`` in bytes, and the bytes that it sends in a step where collectives go in a ring."""

    seconds: float
    parameters: int
    experts: int
    sent: float


def of_experts(experts: int, hidden: int, inner: int, chosen: int) -> tuple[str, dict[str, Any]]:
    """Experts that have ``inner`` features together."""
    return "qwen3_moe", {
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


def build(model_type: str, sizes: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # Llama 4 leaves the weights of experts at zero
            if not parameter.any():
                parameter.normal_(0.0, 0.02)
    return model.train()


def measure(
    model_type: str, sizes: dict[str, Any], tokens: int, repeats: int
) -> tuple[dict[str, Cost], float | None]:
    """By way; and the largest share of the pairs of token and expert that one rank has of whole
    experts, None where every expert is given every token."""
    models = {}
    for way in WAYS:
        models[way] = build(model_type, sizes)
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
    costs = {
        way: Cost(
            min(times[way]),
            sum(p.nbytes for p in model.parameters()),
            sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name),
            _sent(model, ids),
        )
        for way, model in models.items()
    }
    return costs, _largest_share(models["experts"], ids)


def _sent(model: nn.Module, ids: Tensor) -> float:
    with Recorder() as recorder:
        model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    return sum(_core.collective_seconds(c.kind, c.size, c.ranks, 1.0) for c in recorder.calls)


def _largest_share(model: nn.Module, ids: Tensor) -> float | None:
    """Of the pairs of token and expert, of the rank that has most."""
    size = dist.get_world_size()
    seen: list[tuple[Any, ...]] = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(input_ids=ids)
    if len(seen[0]) == 1:
        return None
    plan = deepspeed_autotp.tensor_parallel(model).plan
    entry = next(e for e in plan.entries if e.name.endswith("experts.down_proj"))
    ends = torch.tensor([entry.local_shape(rank)[0] for rank in range(size)]).cumsum(0)
    ranks = torch.bucketize(seen[0][1].flatten(), ends, right=True)
    return float(torch.bincount(ranks, minlength=size).max() / ranks.numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 64, 256])
    parser.add_argument("--models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=16384, help="features of all experts together")
    parser.add_argument("--chosen", type=int, default=8, help="experts of a token, at most")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    cases = [
        (f"{experts} experts", *of_experts(experts, asked.hidden, asked.inner, asked.chosen))
        for experts in asked.experts
    ]
    cases += [(name, name, _SIZES | MODELS[name]) for name in asked.models]
    print(
        "of a step: seconds, MB of parameters and of experts on the fullest rank, MB sent;\n"
        "in width, as whole experts"
    )
    with closing(Pool()) as pool:
        for tp in asked.tp:
            for name, *case in cases:
                arguments = (*case, asked.tokens, asked.repeats)
                ranks = pool.run(f"{MODULE}:measure", *arguments, ranks=tp, timeout=TIMEOUT)
                print(f"TP {tp}  {name:11}  {_line(ranks)}", flush=True)


def _line(ranks: list[tuple[dict[str, Cost], float | None]]) -> str:
    """Of the slowest and fullest of the ranks, in both ways."""
    costs = [
        Cost(
            max(each[way].seconds for each, _ in ranks),
            max(each[way].parameters for each, _ in ranks),
            max(each[way].experts for each, _ in ranks),
            max(each[way].sent for each, _ in ranks),
        )
        for way in WAYS
    ]
    width, whole = costs
    share = ranks[0][1]
    return "  ".join(
        [
            f"{width.seconds:.3f} {whole.seconds:.3f} s, ratio {whole.seconds / width.seconds:.2f}",
            f"{width.parameters / 1e6:.1f} {whole.parameters / 1e6:.1f} MB",
            f"{width.experts / 1e6:.1f} {whole.experts / 1e6:.1f} MB",
            f"{width.sent / 1e6:.2f} {whole.sent / 1e6:.2f} MB",
            "all tokens to every expert" if share is None else f"largest share {share:.2f}",
        ]
    )


if __name__ == "__main__":
    main()
