# SPDX-License-Identifier: Apache-2.0
"""What the tests of fully_shard around a sharded model run on ranks."""

import copy
import gc
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import deepspeed_autotp
from deepspeed_autotp.interop.fully_shard import is_distributed
from tests.support import layer_cases
from tests.support.raised_error import raised_error
from tests.support.small_models import build, tokens
from tests.support.training_loops import loss_of

ROWS = 8
STEPS = 3
CLIP = 0.3


def make(family: str, changes: dict[str, Any]) -> nn.Module:
    model = build(family, tied=changes.get("tied", False), **_without_tied(changes)).double()
    model.set_experts_implementation("eager")  # grouped products have no float64
    return model


def _without_tied(changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if key != "tied"}


def meshes(tp: int) -> tuple[DeviceMesh, DeviceMesh]:
    """The data-parallel mesh and the tensor-parallel one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // tp, tp), mesh_dim_names=("dp", "tp"))
    return mesh["dp"], mesh["tp"]


def spread(model: nn.Module, mesh: DeviceMesh, **more: Any) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **more)
    return fully_shard(model, mesh=mesh, **more)


def batches(step: int, accumulate: int) -> tuple[Tensor, ...]:
    return tokens(step, rows=ROWS * accumulate).chunk(accumulate)


def train_one(family: str, changes: dict[str, Any], accumulate: int) -> Any:
    """Losses, norms and weights in one process."""
    model = make(family, changes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses, norms = [], []
    for step in range(STEPS):
        for ids in batches(step, accumulate):
            loss = loss_of(model, ids) / accumulate
            loss.backward()
            losses.append(float(loss.detach()))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {n: t.detach() for n, t in model.state_dict().items()}


def train(family: str, changes: dict[str, Any], accumulate: int, syncs: bool, tp: int) -> Any:
    """As :func:`train_one`, on the ranks; ``syncs``: gradients are reduced in each backward."""
    dp, tensor_parallel = meshes(tp)
    model = deepspeed_autotp.parallelize(make(family, changes), mesh=tensor_parallel)
    model = spread(model, dp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses, norms = [], []
    for step in range(STEPS):
        parts = batches(step, accumulate)
        for index, ids in enumerate(parts):
            model.set_requires_gradient_sync(syncs or index == len(parts) - 1)
            loss = loss_of(model, ids.chunk(dp.size())[dp.get_local_rank()]) / accumulate
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total, group=dp.get_group())
            losses.append(float(total) / dp.size())
        norms.append(float(deepspeed_autotp.clip_grad_norm_(model, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    deepspeed_autotp.check_replicas(model)
    return losses, norms, deepspeed_autotp.full_state_dict(model)


def mixed_precision() -> tuple[float, float]:
    """Losses with labels in bfloat16, gradients reduced in float32: of one process, and of TP 2."""
    own = build("qwen3", tied=True).bfloat16()
    expected = own(input_ids=(ids := tokens(0)), labels=ids).loss
    dp, tensor_parallel = meshes(2)
    model = deepspeed_autotp.parallelize(build("qwen3", tied=True), mesh=tensor_parallel)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    spread(model, dp, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    first = model(input_ids=ids, labels=ids).loss
    first.backward()
    deepspeed_autotp.clip_grad_norm_(model, CLIP)
    optimizer.step()
    deepspeed_autotp.check_replicas(model)
    return float(expected.detach()), float(first.detach())


def with_labels() -> tuple[list[float], list[float]]:
    """Losses that the model forms of its sharded logits, in float32: of one process, and here."""
    dp, tensor_parallel = meshes(2)
    own = build("llama", tied=True)
    sharded = deepspeed_autotp.parallelize(build("llama", tied=True), mesh=tensor_parallel)
    curves = []
    for model in (own, spread(sharded, dp)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for step in range(STEPS):
            loss = model(input_ids=(ids := tokens(step)), labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        curves.append(losses)
    return curves[0], curves[1]


def weights_apart(own: nn.Module, model: nn.Module) -> float:
    """The weights' largest difference to those of one process."""
    full = deepspeed_autotp.full_state_dict(model)
    return max(float((full[n] - t).abs().max()) for n, t in own.state_dict().items())


def wrapped_late() -> list[float]:
    """Weights' largest differences to one process after a step each: with two forwards before
    fully_shard, and of a deep copy."""
    dp, tensor_parallel = meshes(2)
    apart = []
    for forwards in (2, 0):
        own = make("qwen3", {})
        model = deepspeed_autotp.parallelize(make("qwen3", {}), mesh=tensor_parallel)
        model = model if forwards else copy.deepcopy(model)
        with torch.no_grad():
            for _ in range(forwards):
                model(input_ids=tokens(0))
        for each in (own, spread(model, dp)):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
            loss_of(each, tokens(0)).backward()
            optimizer.step()
        apart.append(weights_apart(own, model))
    return apart


def through_the_backbone() -> float:
    """Weights' largest difference to one process where the model inside is called before the model,
    and the loss has a penalty on the norms of queries and keys."""
    dp, tensor_parallel = meshes(2)
    own = make("qwen3", {})
    model = deepspeed_autotp.parallelize(make("qwen3", {}), mesh=tensor_parallel)
    for layer in model.model.layers:
        fully_shard(layer, mesh=dp)
    for each in (own, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        loss = each.model(input_ids=tokens(0)).last_hidden_state.square().mean()
        norms = [p for n, p in each.named_parameters() if "q_norm" in n or "k_norm" in n]
        (loss + sum(_all_rows(p.square().sum()) for p in norms)).backward()
        optimizer.step()
    return weights_apart(own, model)


def layers_alone() -> float:
    """Weights' largest difference to one process where fully_shard was called for the layers, and
    the model itself is called, with one head of keys that the TP ranks share."""
    dp, tensor_parallel = meshes(2)
    changes = {"num_key_value_heads": 1}
    own = make("qwen3", changes)
    model = deepspeed_autotp.parallelize(make("qwen3", changes), mesh=tensor_parallel)
    for layer in model.model.layers:
        fully_shard(layer, mesh=dp)
    for each in (own, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        loss_of(each, tokens(0)).backward()
        optimizer.step()
    return weights_apart(own, model)


def _all_rows(total: Any) -> Tensor:
    full: Tensor = total.full_tensor() if is_distributed(total) else total
    return full


def unfrozen_late() -> float:
    """The weights' largest difference to one process where norms are frozen in the first step."""
    dp, tensor_parallel = meshes(2)
    own = make("qwen3", {})
    model = deepspeed_autotp.parallelize(make("qwen3", {}), mesh=tensor_parallel)
    for each in (own, spread(model, dp)):
        norms = [p for n, p in each.named_parameters() if "_norm" in n]
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        for trains in (False, True):
            for parameter in norms:
                parameter.requires_grad_(trains)
            loss_of(each, tokens(0)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return weights_apart(own, model)


def adapted(order: str) -> tuple[float, str]:
    """Weights' largest difference to one process, where LoRA and the norms of queries and keys
    train, or all that merged LoRA has left; and the error of an optimizer over tensors. ``order``:
    adapters come "before" sharding, "after" it, or before it and are "merged" after it."""
    dp, tensor_parallel = meshes(2)
    plain, model = make("qwen3", {}), make("qwen3", {})
    if order == "after":
        model = deepspeed_autotp.parallelize(model, mesh=tensor_parallel)
    own, model = _lora(plain), _lora(model)
    if order != "after":
        model = deepspeed_autotp.parallelize(model, mesh=tensor_parallel)
    if order == "merged":
        own, model = own.merge_and_unload(), model.merge_and_unload()
        gc.collect()  # the model that was sharded
    factors = torch.optim.Adafactor(model.parameters())
    said = raised_error(factors.step)
    inner = model if order == "merged" else model.get_base_model()
    for layer in inner.model.layers:
        fully_shard(layer, mesh=dp)
    fully_shard(model, mesh=dp)
    for each in (own, model):
        for name, parameter in each.named_parameters():
            trains = order == "merged" or "_norm" in name
            parameter.requires_grad_(trains or parameter.requires_grad)
        trained = [p for p in each.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.9)
        for step in range(STEPS):
            loss_of(each, tokens(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    deepspeed_autotp.check_replicas(model)
    return weights_apart(own, model), said


def _lora(model: nn.Module) -> Any:
    torch.manual_seed(3)
    config = LoraConfig(
        r=5,
        target_modules=["q_proj", "v_proj", "o_proj"],
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    return get_peft_model(model, config)  # type: ignore[arg-type]


def infinite_on_one_rank() -> list[float]:
    """The scale of a loss in three steps; in the second one rank has an infinite gradient."""
    dp, tensor_parallel = meshes(2)
    model = deepspeed_autotp.parallelize(build("qwen3", tied=True), mesh=tensor_parallel)
    spread(model, dp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = deepspeed_autotp.GradScaler("cpu", model=model)
    scales = []
    for step in range(3):
        ids = tokens(step)
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
        if step == 1 and dist.get_rank() == 3:
            gradient = next(p.grad for p in model.parameters() if p.grad is not None)
            gradient.to_local().fill_(torch.inf)  # type: ignore[attr-defined]
        before = deepspeed_autotp.full_state_dict(model)
        scaler.step(optimizer)
        scaler.update()
        after = deepspeed_autotp.full_state_dict(model)
        assert all(torch.equal(before[name], after[name]) for name in after) == (step == 1)
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    deepspeed_autotp.check_replicas(model)
    return scales


def compiled() -> float:
    """Weights' largest difference to one process with compiled layers."""
    dp, tensor_parallel = meshes(2)
    own = make("qwen3", {"num_hidden_layers": 1})
    model = deepspeed_autotp.parallelize(
        make("qwen3", {"num_hidden_layers": 1}), mesh=tensor_parallel
    )
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    for each in (own, spread(model, dp)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        loss_of(each, tokens(0)).backward()
        optimizer.step()
    return weights_apart(own, model)


def refusals(folder: str) -> dict[str, str]:
    """What is refused, by what was called."""
    dp, tensor_parallel = meshes(2)
    model = deepspeed_autotp.parallelize(make("qwen3", {}), mesh=tensor_parallel)
    spread(model, dp)
    case = layer_cases.CASES["scale of the model"]
    scaled = layer_cases.shard(layer_cases.build(case), case, mesh=tensor_parallel)
    fully_shard(scaled, mesh=dp)
    config = LoraConfig(target_modules=["q_proj", "o_proj"])
    late = deepspeed_autotp.parallelize(make("qwen3", {}), mesh=tensor_parallel)
    get_peft_model(late, config)  # what is returned is not kept
    gc.collect()
    fully_shard(late, mesh=dp)
    evaluated = spread(deepspeed_autotp.parallelize(make("qwen3", {}), mesh=tensor_parallel), dp)
    with torch.no_grad():
        evaluated(input_ids=tokens(0))
    head = evaluated.lm_head
    assert not is_distributed(head.weight)  # all of this rank's shard, for now
    mixed = deepspeed_autotp.parallelize(make("qwen3", {}), mesh=tensor_parallel)
    mixed = fully_shard(mixed, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return {
        "adapters, their model is gone": raised_error(lambda: late(input_ids=tokens(0))),
        "adapters after": raised_error(lambda: get_peft_model(model, config)),
        "scale of the model": raised_error(lambda: scaled(case.inputs())),
        "save_pretrained": raised_error(lambda: deepspeed_autotp.save_pretrained(model, folder)),
        "gather_params": raised_error(deepspeed_autotp.gather_params(model).__enter__),
        "gather_params, head": raised_error(deepspeed_autotp.gather_params(head).__enter__),
        "gather_params, weight": raised_error(
            deepspeed_autotp.gather_params(head.weight).__enter__
        ),
        "full_state_dict, backbone": raised_error(
            lambda: deepspeed_autotp.full_state_dict(evaluated.model)
        ),
        "mesh": raised_error(lambda: mixed(input_ids=tokens(0))),
        "mesh, clip": raised_error(lambda: deepspeed_autotp.clip_grad_norm_(mixed, CLIP)),
    }
