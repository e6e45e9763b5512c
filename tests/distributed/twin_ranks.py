# SPDX-License-Identifier: Apache-2.0
"""Models that a twin stands for in the self-check."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from deepspeed_autotp.self_check import twin as twins
from deepspeed_autotp.self_check.self_check import SelfCheck
from tests.support.log_records import logged_warnings
from tests.support.loss_curves import single_losses, worst_difference
from tests.support.model_snapshot import refusal
from tests.support.models_on_rank0 import weights_on_rank0
from tests.support.small_models import build

Q_AS_ROW = {
    "layer_specs": [{"patterns": [r".*\.q_proj\.weight$"], "partition_type": "row"}],
    "use_default_specs": False,
}
SHAPED = {
    "layer_specs": [
        {"patterns": [r".*\.[qkv]_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.o_proj\.weight$"], "partition_type": "row"},
        {
            "patterns": [r".*\.gate_up_proj\.weight$"],
            "partition_type": "column",
            "shape": [[112, 112], -1],
        },
        {"patterns": [r".*\.down_proj\.weight$"], "partition_type": "row"},
        {
            "patterns": [r".*\.qkv_proj\.weight$"],
            "partition_type": "column",
            "shape": [[64, 32, 32], -1],
        },
    ],
}


# Styles that are wrong in one block.
WRONG = {
    "fails": {"model.layers.*.mlp.down_proj": "replicate"},
    "differs": {"model.layers.*.mlp.gate_proj": "packed_colwise"},
    "gradient": {"model.layers.*.self_attn.q_norm": "replicate"},
}


def _wrong(kind: str) -> nn.Module:
    model = build("qwen3" if kind == "gradient" else "llama", tied=False)
    vars(model)["_tp_plan"] = {**(vars(model).get("_tp_plan") or {}), **WRONG[kind]}
    return model


@contextmanager
def checked() -> Iterator[list[int]]:
    """The numbers of parameters of the models that self-checks within it run."""
    sizes: list[int] = []
    own = SelfCheck.run

    def run(self: SelfCheck, *args: Any, **kwargs: Any) -> Any:
        sizes.append(sum(p.numel() for p in self._model.parameters()))
        return own(self, *args, **kwargs)

    SelfCheck.run = run  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        SelfCheck.run = own  # type: ignore[method-assign]


def _large(**changes: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "vocab_size": 1000,
    }
    return build("llama", tied=False, **{**sizes, **changes})


def sizes_checked(self_check: Any, kind: str) -> tuple[list[int], int]:
    """What was checked of a model, and its size."""
    model = _changed(kind)
    section = {"self_check": self_check}
    size = sum(p.numel() for p in model.parameters())
    with checked() as sizes:
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=section)
    return sizes, size


def _changed(kind: str) -> Any:
    model: Any = _large()
    if kind == "hooked":
        model.model.layers[2].register_forward_hook(lambda module, args, output: None)
    elif kind == "other class":
        model.model.layers[3].mlp.act_fn = nn.GELU()
    elif kind == "other forward":
        layer = model.model.layers[1].mlp
        own = layer.forward
        layer.forward = lambda x: own(x)
    elif kind == "checkpointed":
        model.gradient_checkpointing_enable()
    elif kind == "other loss":
        own_loss = model.loss_function
        model.loss_function = lambda *args, **kwargs: 2 * own_loss(*args, **kwargs)
    elif kind == "other sizes":
        model.model.layers[3].mlp.up_proj = nn.Linear(128, 192, bias=False)
        model.model.layers[3].mlp.gate_proj = nn.Linear(128, 192, bias=False)
        model.model.layers[3].mlp.down_proj = nn.Linear(192, 128, bias=False)
    elif kind == "more layers":
        model.model.layers[0].extra = nn.Linear(128, 128)
    elif kind == "adapter":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    return model


def meta_model(self_check: Any) -> tuple[list[int], float]:
    """What was checked where TP rank 0 alone has the weights, and how far the losses are from
    those of one process."""
    expected = single_losses(_large(), clip=0.0)
    with weights_on_rank0(dist.get_world_size()):
        model = _large()
    with checked() as sizes:
        deepspeed_autotp.parallelize(
            model, tp_size=dist.get_world_size(), config={"self_check": self_check}
        )
    return sizes, worst_difference(single_losses(model, clip=0.0), expected)


def sharded_tokens_on_meta() -> float:
    """How far the losses with sharded tokens are from those of one process, where TP rank 0 alone
    has the weights."""
    expected = single_losses(_large(), clip=0.0)
    with weights_on_rank0(dist.get_world_size()):
        model = _large()
    deepspeed_autotp.parallelize(
        model, tp_size=dist.get_world_size(), config={"sequence_parallel": True}
    )
    return worst_difference(single_losses(model, clip=0.0), expected)


def wrong_rule_on_meta() -> str:
    """The refusal of a wrong plan where TP rank 0 alone has the weights."""
    with weights_on_rank0(dist.get_world_size()):
        model = _large()
    section = {"partition_config": Q_AS_ROW}
    try:
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=section)
    except ValueError as error:
        return str(error)
    return "accepted"


def fallback(kind: str) -> tuple[list[int], float, list[str], list[str]]:
    """What was checked of a model whose own plan is wrong in a block, how far its losses are from
    those of one process, the warnings, and the individually sharded layers."""
    expected = single_losses(_wrong(kind), clip=0.0)
    model = _wrong(kind)
    with checked() as sizes, logged_warnings() as warnings:
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    plan = deepspeed_autotp.tensor_parallel(model).plan
    losses = single_losses(model, clip=0.0)
    individual = [x.module for x in plan.layers if x.gather_output or x.split_input]
    return sizes, worst_difference(losses, expected), warnings, individual


def refused_under_rules() -> str:
    """The refusal of a rule of the user that is wrong, seen in the twin."""
    model = _large()
    section = {"partition_config": Q_AS_ROW}
    return refusal(
        model,
        lambda: deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=section),
    )


def shaped_rules() -> tuple[list[int], int]:
    """What was checked of a model under rules with sizes, and its size."""
    model = build("phi3", tied=False)
    size = sum(p.numel() for p in model.parameters())
    with checked() as sizes:
        deepspeed_autotp.parallelize(
            model, tp_size=dist.get_world_size(), config={"partition_config": SHAPED}
        )
    return sizes, size


def states_left() -> tuple[bool, bool, bool, torch.dtype]:
    """Whether the RNG states are as before, and the default data type."""
    torch.manual_seed(5)
    random.seed(6)
    np.random.seed(7)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    model = _large()
    torch.set_rng_state(before[0])
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    return (
        torch.equal(before[0], torch.get_rng_state()),
        before[1] == random.getstate(),
        before[2] == str(np.random.get_state()),
        torch.get_default_dtype(),
    )


def other_twins() -> tuple[list[int], int]:
    """What is checked where the ranks would make different twins, and the model's size."""
    own = twins._with_few_layers
    model = _large()
    size = sum(p.numel() for p in model.parameters())

    def few(model: nn.Module) -> Any:
        found = own(model)
        if dist.get_rank() == 1 and found is not None:
            found[0].vocab_size += 2
        return found

    twins._with_few_layers = few
    try:
        with checked() as sizes:
            deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    finally:
        twins._with_few_layers = own
    return sizes, size
