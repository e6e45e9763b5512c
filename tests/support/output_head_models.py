# SPDX-License-Identifier: Apache-2.0
"""Small models of several families that take labels, sharded over all ranks of the job."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.small_models import tokens

# No multiple of a number of ranks.
VOCABULARY = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
_MORE: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.7},
    "granite": {"logits_scaling": 3.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0},
}
_ENCODER: dict[str, Any] = {
    "layer_specs": [
        {"patterns": [r".*\.(query|key|value)\.weight"], "partition_type": "column"},
        {"patterns": [r".*\.intermediate\.dense\.weight"], "partition_type": "column"},
        {
            "patterns": [r".*layer\.\d+(\.attention)?\.output\.dense\.weight"],
            "partition_type": "row",
        },
    ]
}
FAMILIES = tuple(_MORE)


def build(family: str, *, tied: bool, seed: int = 0, **changes: Any) -> nn.Module:
    """In float32 and training mode; bert with its masked-LM head, the others causal."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    torch.manual_seed(seed)
    sizes = {**_SIZES, **_MORE[family], "tie_word_embeddings": tied, **changes}
    config = AutoConfig.for_model(family, **sizes)
    kind = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    model: nn.Module = kind.from_config(config, dtype=torch.float32)
    return model.train()


def soft_cap(family: str) -> float:
    """Of the family's logits; 0 without one."""
    cap: float = _MORE[family].get("final_logit_softcapping", 0.0)
    return cap


def section(family: str, **more: Any) -> dict[str, Any]:
    return {**({"partition_config": _ENCODER} if family == "bert" else {}), **more}


def shard(model: nn.Module, family: str, **more: Any) -> nn.Module:
    return deepspeed_autotp.parallelize(
        model, tp_size=dist.get_world_size(), config=section(family, **more)
    )


def batch() -> dict[str, Tensor]:
    """Tokens, and labels of which some are ignored."""
    ids = tokens(0, vocabulary=VOCABULARY)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[2] = -100
    return {"input_ids": ids, "labels": labels}


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of a sharded model, by name; every rank calls it."""
    state = deepspeed_autotp.tensor_parallel(model)
    found = {}
    for name, parameter in model.named_parameters():
        entry = state.entry(parameter)
        if entry is None or parameter.grad is None:
            continue
        own = parameter.grad
        found[name] = state.gather(own, entry=entry) if entry.dim >= 0 else own
    return found


def gradient_difference(model: nn.Module, other: nn.Module) -> float:
    """The worst relative difference of a gradient of ``model`` to that of an unsharded one."""
    got = full_gradients(model)
    expected = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    largest = max(float(g.norm()) for g in expected.values())
    return max(
        float((got[n] - g).norm()) / max(float(g.norm()), 1e-3 * largest, 1e-30)
        for n, g in expected.items()
    )
