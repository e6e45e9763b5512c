# SPDX-License-Identifier: Apache-2.0
"""Faults of a sharded model that only its training path, or close comparison, shows."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed_autotp
from deepspeed_autotp.interop.module_state import set_state
from deepspeed_autotp.layers.layer_sharding import sharding_of
from deepspeed_autotp.sharding.conversion import Conversion
from tests.support.log_records import logged_warnings
from tests.support.loss_curves import single_losses, worst_difference
from tests.support.model_snapshot import refusal
from tests.support.small_models import build

HEADS = 64
VALUES = "model.layers.1.self_attn.v_proj"
OUTPUT = "model.layers.1.self_attn.o_proj"
NO_NORM_SUM = {
    "layer_specs": [
        {"patterns": [r".*\.[qkv]_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.o_proj\.weight$"], "partition_type": "row"},
    ],
    "use_default_specs": False,
}
PAIR = {
    "layer_specs": [
        {"patterns": [r".*up\.weight"], "partition_type": "column"},
        {"patterns": [r".*down\.weight"], "partition_type": "row"},
    ]
}
# How large the values of a bias are beside those of the output that it is added to.
BIAS = 0.03


@contextmanager
def _views_with(name: str, tensor: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """In every sharded model of the self-check this tensor has been changed like this."""
    own = Conversion.swap_in_views

    def swap_in_views(self: Conversion) -> None:
        own(self)
        parameter = self._modules[name].get_parameter(tensor)
        self._swap_data(parameter, change(parameter.data.clone()))

    Conversion.swap_in_views = swap_in_views  # type: ignore[method-assign]
    try:
        yield
    finally:
        Conversion.swap_in_views = own  # type: ignore[method-assign]


def _with_wrong_head(weight: Tensor) -> Tensor:
    """The first head of TP rank 0 has the values of the second one."""
    if dist.get_rank() == 0:
        size = weight.shape[0] * dist.get_world_size() // HEADS
        weight[:size] = weight[size : 2 * size]
    return weight


def wrong_head(dtype: torch.dtype, self_check: Any) -> str:
    """The refusal of a model in which one of its heads is another one."""
    model = build(
        "llama",
        tied=False,
        hidden_size=256,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    ).to(dtype)
    with _views_with(VALUES, "weight", _with_wrong_head):
        return _refused(model, {"preset_model": "llama", "self_check": self_check})


def repeated_bias(dtype: torch.dtype, self_check: Any) -> str:
    """The refusal of a model in which every rank adds the bias of a row layer."""
    model: Any = build("llama", tied=False, attention_bias=True).to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.normal_(std=BIAS * 0.02)
    with _views_with(OUTPUT, "bias", lambda bias: bias * dist.get_world_size()):
        return _refused(model, {"preset_model": "llama", "self_check": self_check})


def missing_sum(dtype: torch.dtype, self_check: Any) -> str:
    """The refusal of a model in which no rank sums the gradient of a norm of the keys."""
    model = build("qwen3", tied=False).to(dtype)
    return _refused(model, {"partition_config": NO_NORM_SUM, "self_check": self_check})


class Sparse(nn.Module):
    """In training its loss has a second term, made of features that are sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        inner = torch.relu(self.up(self.embed(input_ids)))
        logits = F.linear(self.down(inner), self.embed.weight)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if self.training:
            loss = loss + 1e-3 * inner.flatten(0, 1).mean(0).square().sum()
        return {"loss": loss, "logits": logits}


def other_router_loss(dtype: torch.dtype, self_check: Any) -> str:
    """The refusal of a model whose auxiliary loss each rank forms from its own shard."""
    torch.manual_seed(0)
    ids = torch.arange(12).reshape(2, 6)
    return _refused(
        Sparse().to(dtype),
        {"partition_config": PAIR, "self_check": self_check},
        {"input_ids": ids, "labels": ids},
    )


class Noisy(nn.Module):
    """Dropout of a replicated activation, with the RNG state that ``seed`` gives."""

    def __init__(self, seed: Callable[[], int] | None) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.inner = nn.Dropout(0.1)
        self.outer = nn.Dropout(0.1)
        self.seed = seed

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.inner(torch.relu(self.up(x))))
        if self.training and self.seed is not None:
            torch.manual_seed(self.seed())
        result: Tensor = self.outer(y)
        return result


def misplaced_dropout(dtype: torch.dtype, self_check: Any) -> str:
    """The refusal of a model of which each rank would drop other elements of one activation."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    return _refused(
        Noisy(dist.get_rank).to(dtype),
        {"partition_config": PAIR, "self_check": self_check},
        {"x": x},
    )


def dropout_in_place(dtype: torch.dtype) -> list[str]:
    """The warnings for a model with dropout where it may be."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    with logged_warnings() as warnings:
        deepspeed_autotp.parallelize(
            Noisy(None).to(dtype),
            tp_size=dist.get_world_size(),
            config={"partition_config": PAIR, "self_check": True},
            example_inputs={"x": x},
        )
    return list(warnings)


def _refused(
    model: nn.Module, section: dict[str, Any], inputs: dict[str, object] | None = None
) -> str:
    return refusal(
        model,
        lambda: deepspeed_autotp.parallelize(
            model, tp_size=dist.get_world_size(), config=section, example_inputs=inputs
        ),
    )


@contextmanager
def _shard_used_as_full() -> Iterator[None]:
    """The output head hands out its shard of the logits, and the model takes it for all."""
    own = Conversion.keep_logits

    def keep_logits(self: Conversion, *, insist: bool = False) -> None:
        head = self._plan.logits_layer
        if head is None:
            return
        module = self._modules[head.module]
        full = dataclasses.replace(sharding_of(module), gather=lambda shard, _: shard)
        self._undo.append(set_state(module, full))

    Conversion.keep_logits = keep_logits  # type: ignore[method-assign]
    try:
        yield
    finally:
        Conversion.keep_logits = own  # type: ignore[method-assign]


def shard_as_full(dtype: torch.dtype) -> tuple[float, list[str], bool]:
    """How far the losses are from those of one process, the warnings, and whether the logits are
    sharded, of a model that takes a shard of its logits for all of them."""
    expected = single_losses(build("llama", tied=False).to(dtype), clip=0.0)
    model = build("llama", tied=False).to(dtype)
    with _shard_used_as_full(), logged_warnings() as warnings:
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
        losses = single_losses(model, clip=0.0)
    plan = deepspeed_autotp.tensor_parallel(model).plan
    return worst_difference(losses, expected), warnings, plan.logits_layer is not None


def shard_as_full_on_request() -> str:
    """The refusal of such a model where the user insists on sharded logits."""
    model = build("llama", tied=False)
    with _shard_used_as_full():
        return _refused(model, {"vocab_parallel_lm_head": True})


def shard_as_full_under_rules() -> tuple[list[str], bool]:
    """The warnings, and whether the logits are sharded, under rules of the user."""
    model = build("llama", tied=False)
    with _shard_used_as_full(), logged_warnings() as warnings:
        deepspeed_autotp.parallelize(
            model, tp_size=dist.get_world_size(), config={"preset_model": "llama"}
        )
    return warnings, deepspeed_autotp.tensor_parallel(model).plan.logits_layer is not None


def accepted(family: str, dtype: torch.dtype, changes: dict[str, Any]) -> list[str]:
    """The warnings for a model that is right, with everything random on."""
    model = build(family, tied=False, **changes).to(dtype)
    with logged_warnings() as warnings:
        deepspeed_autotp.parallelize(
            model, tp_size=dist.get_world_size(), config={"self_check": True}
        )
    return warnings


class OneType(nn.Module):
    """A layer that runs in one data type only, as some kernels do."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == self.dtype
        y: Tensor = self.inner(x)
        return y


def wrong_head_in_one_type(dtype: torch.dtype, fault: bool) -> str:
    """The refusal, or what the plan shards, of a model that cannot run in float32."""
    model: Any = build(
        "llama",
        tied=False,
        hidden_size=256,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    ).to(dtype)
    model.model.norm = OneType(model.model.norm, dtype)
    if fault:
        with _views_with(VALUES, "weight", _with_wrong_head):
            return _refused(model, {"preset_model": "llama"})
    deepspeed_autotp.parallelize(
        model, tp_size=dist.get_world_size(), config={"preset_model": "llama", "self_check": True}
    )
    return "accepted"
