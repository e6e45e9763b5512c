# SPDX-License-Identifier: Apache-2.0
"""Small models in float64, and what spreads them over the dimensions of a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.support.mesh_runs import MeshRun
from tests.support.small_models import build

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Key heads that ranks share; heads and vocabulary that they have unevenly; per-head norms; experts.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "tied": True, "num_key_value_heads": 1},
    "gpt2": {
        "family": "gpt2",
        "tied": True,
        "num_attention_heads": 3,
        "hidden_size": 60,
        "vocab_size": 97,
        **NO_DROPOUT,
    },
    "qwen3": {"family": "qwen3", "tied": False},
    "experts": {
        "family": "qwen3_moe",
        "tied": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    },
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.01, eps=1e-4),
    "AdamW foreach": functools.partial(torch.optim.AdamW, lr=0.01, eps=1e-4, foreach=True),
    "AdamW fused": functools.partial(torch.optim.AdamW, lr=0.01, eps=1e-4, fused=True),
}


def make(run: MeshRun, **changes: Any) -> nn.Module:
    """The model in float64, with one layer where it is compiled."""
    sizes = FAMILIES[run.family] | ({"num_hidden_layers": 1} if run.compiled else {}) | changes
    model = build(sizes.pop("family"), **sizes).double()
    if run.family == "experts":
        model.set_experts_implementation("eager")  # grouped products have no float64
    if run.trained == "half":
        for parameter in list(model.parameters())[::2]:
            parameter.requires_grad_(False)
    if run.trained == "lora":
        torch.manual_seed(3)
        names = ["q_proj", "v_proj", "o_proj"]
        config = LoraConfig(r=5, target_modules=names, init_lora_weights=False)
        return get_peft_model(model, config)  # type: ignore[arg-type]
    return model


def blocks(model: nn.Module) -> nn.ModuleList:
    """The list of the model's blocks: the outermost list of modules."""
    return next(each for each in model.modules() if isinstance(each, nn.ModuleList))


def meshes(run: MeshRun) -> tuple[DeviceMesh, DeviceMesh]:
    """The mesh of the data-parallel ranks and that of the TP ranks."""
    replicas = dist.get_world_size() // run.tp
    if run.way == "hsdp":
        shape, names = (2, replicas // 2, run.tp), ("dp_replicate", "dp_shard", "tp")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        return mesh["dp_replicate", "dp_shard"], mesh["tp"]
    if run.tp_first:
        mesh = init_device_mesh("cpu", (run.tp, replicas), mesh_dim_names=("tp", "dp"))
    else:
        mesh = init_device_mesh("cpu", (replicas, run.tp), mesh_dim_names=("dp", "tp"))
    return mesh["dp"], mesh["tp"]


def prepare(run: MeshRun, model: nn.Module) -> None:
    """Activation checkpointing and torch.compile of the blocks, in the order that torch asks for:
    after sharding, before fully_shard."""
    layers = blocks(model)
    if run.checkpoint == "wrapper":
        own = set(layers)
        apply_activation_checkpointing(model, check_fn=lambda module: module in own)
    elif run.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": run.checkpoint == "reentrant"})
        if run.trained:
            model.enable_input_require_grads()
    for index, layer in enumerate(layers):
        if run.compiled == "blocks":
            layer.compile(backend="aot_eager")
        if run.compiled == "replaced blocks":
            layers[index] = torch.compile(layer, backend="aot_eager")  # type: ignore[assignment]


def spread(run: MeshRun, model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    if run.way == "ddp":
        return DistributedDataParallel(model, process_group=mesh.get_group())
    options |= {"mesh": mesh}
    if run.reshard is not None:
        options["reshard_after_forward"] = run.reshard
    if run.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for layer in () if run.whole else blocks(model):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def replica_of(mesh: DeviceMesh) -> int:
    """The number of this rank in the data-parallel mesh."""
    return int(mesh.mesh.flatten().tolist().index(dist.get_rank()))


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(
    after: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor]
) -> float:
    """How far weights are from the expected ones, relative to how far these have moved: the largest
    of all, as which an error in one gradient shows."""
    assert after.keys() == expected.keys(), sorted(after.keys() ^ expected.keys())[:4]
    found = []
    for name, tensor in expected.items():
        step = (tensor - before[name]).norm()
        found.append(float((after[name] - tensor).norm() / (step if step > 0 else 1.0)))
    return max(found)
