# SPDX-License-Identifier: Apache-2.0
"""Models of which TP rank 0 alone has the weights."""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed_autotp
from deepspeed_autotp.distributed.transport import ShardSizes, Transport
from tests.support.engine_config import Setting, engine_config
from tests.support.handmade_model import build_handmade, example
from tests.support.log_records import LoggedMessages
from tests.support.loss_curves import RATE, single_losses, train_engine, worst_difference
from tests.support.model_snapshot import refusal
from tests.support.models_on_rank0 import same_weights, weights_on_rank0
from tests.support.peak_memory import PeakMemory
from tests.support.small_models import build, model_with_buffers, tokens
from tests.support.training_loops import SHAPES, apart, make, train_sharded, train_unsharded

PARAMETER = "model.layers.1.mlp.up_proj.weight"


def compare(shape: str) -> tuple[dict[str, float], list[bool]]:
    """Differences to one process, and whether weights, objects and ties are as they were."""
    tp = dist.get_world_size()
    unsharded = make(**SHAPES[shape])
    with weights_on_rank0(tp):
        model = make(**SHAPES[shape])
    before = [id(p) for p in model.parameters()]
    deepspeed_autotp.parallelize(model, tp_size=tp)
    kept = [
        same_weights(model, unsharded),
        before == [id(p) for p in model.parameters()],
        model.get_input_embeddings().weight is model.get_output_embeddings().weight,  # type: ignore[operator]
    ]
    return apart(unsharded, model, (train_unsharded(unsharded), train_sharded(model))), kept


def train_replicas(zero: int) -> tuple[float, bool]:
    """Difference of losses, and whether weights are as they were: TP 2 x DP 2 in an engine.

    Its optimizer was given the tensors without values.
    """
    unsharded = build("qwen2", tied=True)
    with weights_on_rank0(2):
        model = build("qwen2", tied=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    setting = Setting(tp=2, zero=zero, clip=1.0, self_check="auto")
    engine, *_ = deepspeed_autotp.initialize(
        model=model, optimizer=optimizer, config=engine_config(setting)
    )
    kept = same_weights(engine, unsharded)
    losses = train_engine(engine, tp=2)
    deepspeed_autotp.check_replicas(engine)
    engine.destroy()
    return worst_difference(losses, single_losses(unsharded, clip=1.0)), kept


def handmade(partition: dict[str, Any] | None) -> tuple[str, float]:
    """Fused weights by rules, or without any, of ranks that do not follow one another."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    unsharded = build_handmade()
    with torch.device("meta") if rank > 1 else contextlib.nullcontext():
        model = build_handmade()
    config = {} if partition is None else {"partition_config": partition}
    try:
        deepspeed_autotp.parallelize(model, tp_group=groups[rank % 2], config=config)
    except ValueError as error:
        return str(error), 0.0
    apart = model(**example()) - unsharded(**example())
    return f"same: {same_weights(model, unsharded)}", float(apart.detach().abs())


def load(folder: str, tied: bool) -> list[bool]:
    """Rank 0 loads what was saved, the others build it as Accelerate and torch do."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    rank = dist.get_rank()
    if rank == 0:
        build("llama", tied=tied).save_pretrained(folder)  # type: ignore[operator]
    dist.barrier()
    unsharded = AutoModelForCausalLM.from_pretrained(folder)
    model = unsharded
    if rank > 0:
        with init_empty_weights() if rank == 1 else torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        model.tie_weights()  # Accelerate makes two tensors of one
    expected = [unsharded.state_dict()[name].clone() for name in unsharded.state_dict()]
    ids = tokens(0)
    loss = unsharded(input_ids=ids, labels=ids).loss.detach()
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    full = deepspeed_autotp.full_state_dict(model)
    apart = float((model(input_ids=ids, labels=ids).loss.detach() - loss).abs())
    same = all(torch.equal(a, b) for a, b in zip(expected, full.values(), strict=True))
    return [same, apart < 1e-5, not model.training]


def other_state() -> list[bool]:
    """Buffers of rare types, some of which have values, a frozen weight, flags, and modes."""
    rank = dist.get_rank()
    unsharded = model_with_buffers(0)
    with weights_on_rank0(dist.get_world_size()):
        model = model_with_buffers(0)
    if rank:
        model.register_buffer("count", torch.tensor(5))
        model.register_buffer("mask", torch.empty(2, dtype=torch.bool, device="meta"))
        model.register_buffer("phase", torch.empty(1, dtype=torch.complex64, device="meta"))
        model.eval()
    frozen = model.get_parameter(PARAMETER).requires_grad_(False)
    vars(frozen)["is_marked"] = True
    model.model.layers[0].eval()
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    modes = [m.training for m in model.modules()]
    return [
        same_weights(model, unsharded),
        torch.equal(model.model.rotary_emb.inv_freq, unsharded.model.rotary_emb.inv_freq),
        not frozen.requires_grad and model.get_parameter(PARAMETER) is frozen,
        vars(frozen)["is_marked"],
        model.training and not model.model.layers[0].training and modes.count(True) > 10,
    ]


def warned(self_check: Any) -> list[str]:
    """What is said of a model that no small one stands for, since it has a hook."""
    with weights_on_rank0(2):
        model = build("llama", tied=False)
    model.register_forward_hook(lambda module, args, output: None)
    with LoggedMessages() as said:
        deepspeed_autotp.parallelize(model, tp_size=2, config={"self_check": self_check})
    return said


def memory() -> tuple[int, int, int, list[int]]:
    """Most bytes that were made, this rank's shards, the largest weight, and on rank 0 how many
    full weights were there at each scatter."""
    with weights_on_rank0(dist.get_world_size()):
        model = build("llama", tied=False)
    wholes: weakref.WeakSet[Any] = weakref.WeakSet(
        p.untyped_storage() for p in model.parameters() if p.dim() == 2 and not p.is_meta
    )
    largest = max(p.nbytes for p in model.parameters())
    counts = []
    scatter = Transport.scatter

    def counted(*args: Any) -> None:
        counts.append(len(wholes))
        scatter(*args)

    with mock.patch.object(Transport, "scatter", counted), PeakMemory() as peak:
        deepspeed_autotp.parallelize(
            model, tp_size=dist.get_world_size(), config={"self_check": False}
        )
    own = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return peak.most, own, largest, counts


def _all_meta(model: nn.Module) -> None:
    model.to("meta")


def _partly(model: nn.Module) -> None:
    model.get_submodule("model.layers.1.mlp.up_proj").to("meta")


def _with_attribute(model: nn.Module) -> None:
    model.to("meta")
    vars(model.get_submodule("model.norm"))["kept"] = torch.empty(2, device="meta")


def _with_hook(model: nn.Module) -> None:
    model.to("meta")
    model.get_parameter(PARAMETER).register_hook(lambda gradient: gradient)


def _with_subclass(model: nn.Module) -> None:
    class Special(nn.Parameter):
        pass

    model.to("meta")
    module = model.get_submodule("model.layers.1.mlp.up_proj")
    module.weight = Special(torch.empty(112, 64, device="meta"))


def _with_reference(model: nn.Module) -> None:
    model.to("meta")
    vars(model)["held"] = weakref.ref(model.get_parameter(PARAMETER))


def _with_more(model: nn.Module) -> None:
    model.to("meta")
    model.add_module("dropout", nn.Dropout())


def _with_dropout(model: nn.Module, p: float) -> None:
    model.add_module("dropout", nn.Dropout(p))


def _with_act(model: nn.Module) -> None:
    """Built from another configuration, as far as that shows in no module."""
    model.config.hidden_act = "gelu"  # type: ignore[union-attr]


def _meta_with_act(model: nn.Module) -> None:
    model.to("meta")
    _with_act(model)


_STATES: dict[str, Callable[[nn.Module], None]] = {
    "": lambda model: None,
    "meta": _all_meta,
    "partly": _partly,
    "attribute": _with_attribute,
    "hook": _with_hook,
    "subclass": _with_subclass,
    "reference": _with_reference,
    "more": _with_more,
    "dropout": lambda model: _with_dropout(model, 0.1),
    "more dropout": lambda model: _with_dropout(model, 0.3),
    "act": _with_act,
    "meta act": _meta_with_act,
}


def refused(states: list[str], tp: int, config: dict[str, Any], more: dict[str, Any]) -> str:
    """What is raised for models in these states, one for each rank; the model is as it was."""
    model = build("llama", tied=False)
    _STATES[states[dist.get_rank()]](model)
    return refusal(
        model,
        lambda: deepspeed_autotp.parallelize(model, tp_size=tp, config=config, **more),
    )


def fails_on_the_way(failing: int, after: int) -> str:
    """What every rank raises where one fails after so many weights."""
    with weights_on_rank0(dist.get_world_size()):
        model = build("llama", tied=False)
    scatter, done = Transport.scatter, []

    def failing_scatter(through: Transport, parts: Any, into: Tensor, sizes: ShardSizes) -> None:
        if dist.get_rank() == failing and len(done) == after:
            raise MemoryError("no more")
        done.append(into)
        scatter(through, parts, into, sizes)

    with mock.patch.object(Transport, "scatter", failing_scatter):
        try:
            deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
        except RuntimeError as error:
            return str(error)
    return "nothing was raised"
