# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_expert_partition.py do: whole experts on each rank."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from tests.support.architectures import build
from tests.support.engine_config import Setting, engine_config
from tests.support.loss_curves import sgd, single_losses, train_engine, worst_difference
from tests.support.pretrained_models import build_pretrained, load_pretrained
from tests.support.raised_error import raised_error
from tests.support.small_models import tokens

WHOLE = {"expert_partition": "experts"}


def train(
    name: str, zero: int | None, section: dict[str, Any], implementation: str | None = "grouped_mm"
) -> dict[str, Any]:
    """Train over all ranks, with an engine or, without ``zero``, a plain loop; against one
    process."""
    build_model = _step if name == "step3p7" else lambda: build(name)
    alone = build_model()
    expected = single_losses(alone, clip=0.5)
    model, tp = build_model(), dist.get_world_size()
    if implementation is not None:
        model.set_experts_implementation(implementation)
    if zero is None:
        section = section | {"autotp_size": tp}
        deepspeed_autotp.parallelize(model, config=section)
        optimizer = sgd(model)
        losses = []
        for step in range(4):
            ids = tokens(step)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            deepspeed_autotp.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    else:
        config = engine_config(Setting(tp=tp, zero=zero, clip=0.5))
        config["tensor_parallel"] |= section
        model = deepspeed_autotp.initialize(model=model, optimizer=sgd(model), config=config)[0]
        losses = train_engine(model, tp=tp)
    plan = deepspeed_autotp.tensor_parallel(model).plan
    deepspeed_autotp.check_replicas(model)
    full = deepspeed_autotp.full_state_dict(model)
    return {
        "losses": worst_difference(losses, expected),
        "weights": max(
            float((full[n] - p.detach()).abs().max()) for n, p in alone.named_parameters()
        ),
        "kinds": {str(layer.kind) for layer in plan.layers},
        "first": [
            entry.local_shape(dist.get_rank())[0]
            for entry in plan.entries
            if ".experts." in entry.name and entry.is_sharded
        ],
    }


def _step() -> nn.Module:
    """A vision-language model, whose experts transformers runs in one way."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    text = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "share_expert_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_sliding_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["full_attention"] * 2,
        "sliding_window": 8,
        "swiglu_limits": [0.0, 0.5],
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = AutoConfig.for_model("step3p7", text_config=text, vision_config=vision)
    model: nn.Module = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return model.train()


def _crowded() -> nn.Module:
    """All tokens choose the two experts of rank 0 of two."""
    model = build("gpt_oss")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.bias"):
                parameter.copy_(torch.tensor([100.0, 100.0, -100.0, -100.0]))
    return model


def train_crowded() -> float:
    """A rank none of whose experts is chosen takes part in every collective."""
    expected = single_losses(_crowded(), clip=0.0)
    model = _crowded()
    deepspeed_autotp.parallelize(model, tp_size=2, config=WHOLE)
    return worst_difference(single_losses(model, clip=0.0), expected)


def overflow() -> float:
    """In float16, with experts that no token names and whose output is infinite."""
    losses = []
    for sharded in (False, True):
        model = _crowded()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("experts.down_proj"):
                    parameter[2:] *= 1e5
        if sharded:
            config = WHOLE | {"self_check": False}
            deepspeed_autotp.parallelize(model, tp_size=2, config=config)
        losses += single_losses(model.half(), clip=0.0, steps=2)
    return worst_difference(losses[2:], losses[:2])


def without_tokens() -> list[tuple[int, ...]]:
    """The shapes of what sharded experts give for no tokens at all."""
    empty = torch.empty(0, 2)
    shapes = []
    for name, module, routing in (
        ("mixtral", "model.layers.0.mlp.experts", (empty.long(), empty)),
        ("llama4_text", "model.layers.1.feed_forward.experts", ()),
    ):
        model = build(name)
        deepspeed_autotp.parallelize(model, tp_size=2, config=WHOLE)
        experts = model.get_submodule(module)
        shapes.append(tuple(experts(torch.empty(0, 64), *routing).shape))
    return shapes


def refused(cases: dict[str, str]) -> dict[str, str]:
    section = {"autotp_size": dist.get_world_size(), **WHOLE}

    def error_of(name: str) -> str:
        return raised_error(lambda: deepspeed_autotp.parallelize(build(name), config=section))

    return {label: error_of(name) for label, name in cases.items()}


def write(name: str, folder: str) -> None:
    build_pretrained(name).save_pretrained(folder)


def load_and_save(folder: str, out: str) -> list[str]:
    """What differs in a folder that is saved from ranks of which each read its own experts."""
    from transformers import AutoModelForCausalLM

    size = dist.get_world_size()
    model = deepspeed_autotp.from_pretrained(
        AutoModelForCausalLM, folder, tp_size=size, config=WHOLE
    )
    deepspeed_autotp.save_pretrained(model, out)
    dist.barrier()
    saved, expected = (load_pretrained(each)[0].state_dict() for each in (out, folder))
    return [name for name, tensor in expected.items() if not torch.equal(saved[name], tensor)]
