# SPDX-License-Identifier: Apache-2.0
"""Calls that must be refused: one function per mistake, run on every rank.

Each returns what was raised, after it has checked that the model is as it was before.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from tests.support.engine_config import config_without_section, initialize
from tests.support.handmade_model import PARTITION, build_handmade, example
from tests.support.model_snapshot import Snapshot, refusal
from tests.support.mpu import Mpu
from tests.support.small_models import build


def refused_section(section: dict[str, Any], more: dict[str, Any], family: str = "llama") -> str:
    """A ``tensor_parallel`` section, and what else is in the configuration."""
    model = build(family, tied=False)
    return refusal(model, lambda: initialize(model, section, **more))


def refused_spelling(key: str) -> str:
    """The section under another name."""
    model = build("llama", tied=False)
    config = config_without_section(tp=2) | {key: {"autotp_size": 2}}
    return refusal(model, lambda: deepspeed_autotp.initialize(model=model, config=config))


def refused_on_rank(rank: int, section: dict[str, Any], other: dict[str, Any]) -> str:
    """``section`` on one rank, ``other`` on the rest."""
    model = build("llama", tied=False)
    mine = section if dist.get_rank() == rank else other
    return refusal(model, lambda: initialize(model, mine))


def refused_config(form: str, rank: int | None) -> str:
    """A configuration that cannot be read, on one rank or on all."""
    model = build("llama", tied=False)
    good = config_without_section(tp=2) | {"tensor_parallel": {"autotp_size": 2}}
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder, "broken.json")
        broken.write_text('{"tensor_parallel": {"autotp_size" 2}}')
        bad: Any = {
            "missing": "/nowhere/config.json",
            "folder": folder,
            "broken": str(broken),
            "base64": "bm90IGpzb24=",
            "number": 3,
            "none": None,
        }[form]
        if form in ("folder", "broken") and dist.get_world_size() > 1:
            names = [bad]
            dist.broadcast_object_list(names)  # so that every rank speaks of the same place
            bad = names[0]
        config = bad if rank is None or dist.get_rank() == rank else good
        text = refusal(model, lambda: deepspeed_autotp.initialize(model=model, config=config))
        dist.barrier()
        return text


def refused_pair(kind: str) -> str:
    """A model that differs between the ranks."""
    rank = dist.get_rank()
    changes: dict[str, Any] = {
        "shape": {"intermediate_size": 112 + 16 * rank},
        "layers": {"num_hidden_layers": 2 + rank},
        "family": {},
        "dtype": {},
        "bias": {"mlp_bias": bool(rank)},
    }[kind]
    family = "qwen3" if kind == "family" and rank else "llama"
    model = build(family, tied=False, **changes)
    if kind == "dtype" and rank:
        model.bfloat16()
    return refusal(model, lambda: initialize(model, {"autotp_size": 2}))


def refused_model(kind: str) -> str:
    """A model in a state that cannot be sharded."""
    model = build("llama", tied=False)
    if kind == "meta":
        model.model.layers[1].mlp.up_proj.to("meta")
    elif kind == "gradient":
        model.model.norm.weight.grad = torch.ones(64)
    elif kind == "no plan":
        model = build_handmade()
    elif kind == "compiled":
        model = torch.compile(model)
    elif kind == "no parameters":
        model = nn.Sequential(nn.ReLU())
    return refusal(model, lambda: initialize(model, {"autotp_size": 2}))


def refused_what(kind: str) -> str:
    """Something else than a model."""
    given: Any = {"none": None, "class": nn.Linear, "text": "llama"}[kind]
    model = build("llama", tied=False)
    return refusal(model, lambda: initialize(given, {"autotp_size": 2}))


def refused_twice() -> list[str]:
    """A model that is sharded already: another TP size, none, inside another, and by hand."""
    model = build("llama", tied=False)
    deepspeed_autotp.parallelize(model, tp_size=2)
    before = full(model)
    texts = []
    for call in (
        lambda: initialize(model, {"autotp_size": 4}),
        lambda: initialize(model, {"autotp_size": 0}),
        lambda: initialize(nn.Sequential(model), {"autotp_size": 2}),
        lambda: deepspeed_autotp.parallelize(model, tp_size=2),
    ):
        try:
            call()
        except ValueError as error:
            texts.append(str(error))
    after = full(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return texts


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    return deepspeed_autotp.full_state_dict(model)


def refused_optimizer() -> str:
    model = build("llama", tied=False)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(8).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    config = {"train_micro_batch_size_per_gpu": 1, "tensor_parallel": {"autotp_size": 2}}
    return refusal(
        model,
        lambda: deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config),
    )


def refused_group(where: str) -> str:
    """Groups of every other rank, which DeepSpeed's engine cannot honour."""
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    own = pairs[dist.get_rank() % 2]
    model = build("llama", tied=False)
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
    mpu = None
    if where == "record":
        deepspeed_autotp.tp_model_init(model, 2, "fp32", tp_group=own)
    elif where == "config":
        config["tensor_parallel"] = {"autotp_size": 2, "tp": {"tp_size": 2, "tp_group": own}}
    elif where == "mpu":
        config["tensor_parallel"] = {"autotp_size": 2}
        mpu = Mpu(own)
    return refusal(model, lambda: deepspeed_autotp.initialize(model=model, config=config, mpu=mpu))


def refused_pipeline() -> str:
    import deepspeed

    deepspeed.init_distributed()
    model = deepspeed.PipelineModule([nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=1)
    return refusal(model, lambda: initialize(model, {"autotp_size": 2}))


def fail_in_planning(rank: int) -> str:
    """``describe`` raises on one rank."""
    from deepspeed_autotp.api import pipeline

    model = build("llama", tied=False)
    own = pipeline.describe
    if dist.get_rank() == rank:
        vars(pipeline)["describe"] = lambda model: 1 / 0
    try:
        return refusal(model, lambda: initialize(model, {"autotp_size": 2}))
    finally:
        vars(pipeline)["describe"] = own


def fail_to_switch(rank: int) -> str:
    """One rank cannot change the modules, with the self-check switched off."""
    from deepspeed_autotp.sharding import conversion

    model = build("llama", tied=False)
    own = conversion.sharded_class
    if dist.get_rank() == rank:
        seen: list[str] = []

        def fail_at_the_third(module: nn.Module, kind: str) -> type[nn.Module]:
            seen.append(kind)
            if len(seen) == 3:
                raise KeyError(kind)
            return own(module, kind)

        vars(conversion)["sharded_class"] = fail_at_the_third
    try:
        return refusal(model, lambda: initialize(model, {"autotp_size": 2, "self_check": False}))
    finally:
        vars(conversion)["sharded_class"] = own


def refused_call(kind: str) -> str:
    """Arguments of ``parallelize`` that cannot be right."""
    model = build_handmade()
    good: dict[str, Any] = {"config": {"partition_config": PARTITION}, "example_inputs": example()}
    rank = dist.get_rank()
    changes: dict[str, Any] = {
        "nothing": {},
        "two": {"tp_size": 2, "mesh": mesh("tp")},
        "mesh": {"mesh": mesh("a", "b")},
        "size": {"tp_size": 3},
        "zero": {"tp_size": 0},
        "text": {"tp_size": "2"},
        "one rank's size": {"tp_size": 1 + rank},
        "one rank's type": {"tp_size": 2 if rank else 2.0},
        "config": {"tp_size": 2, "config": {"autotp_size": 4}},
        "nested": {"tp_size": 2, "config": {"tp": {"tp_size": 4}}},
        "config text": {"tp_size": 2, "config": "llama"},
        "inputs": {"tp_size": 2, "example_inputs": {"y": torch.ones(1)}},
        "one rank's inputs": {"tp_size": 2, "example_inputs": example() if rank else None},
        "different inputs": {"tp_size": 2, "example_inputs": example(step=rank)},
        "group": {"tp_group": "tp"},
    }[kind]
    return refusal(model, lambda: deepspeed_autotp.parallelize(model, **{**good, **changes}))


def mesh(*names: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    sizes = (2,) if len(names) == 1 else (1, 2)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def snapshot_of_success() -> bool:
    """That a Snapshot sees a sharded model, so that the checks above can fail."""
    model = build("llama", tied=False)
    before = Snapshot(model)
    deepspeed_autotp.parallelize(model, tp_size=2)
    try:
        before.check()
    except AssertionError:
        return True
    return False
