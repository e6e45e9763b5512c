# SPDX-License-Identifier: Apache-2.0
"""What the tests of Accelerate's ParallelismConfig run on ranks."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.mesh_models import copied, make, moved
from tests.support.mesh_runs import MeshRun
from tests.support.raised_error import raised_error
from tests.support.small_models import tokens
from tests.support.training_loops import loss_of

RUN = MeshRun(family="qwen3")
STEPS = 2
CLIP = 0.3


def _accelerator(**plugin: Any) -> Any:
    """With TP 2 x FSDP 2 on CPUs, which Accelerate takes for GPUs: for CPUs it refuses a mesh."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType, ParallelismConfig

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Accelerator(
        parallelism_config=ParallelismConfig(tp_size=2, dp_shard_size=2),
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
            **plugin,
        ),
    )


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def _prepared(accelerator: Any) -> tuple[Any, Any, Any]:
    model = deepspeed_autotp.parallelize(make(RUN), mesh=accelerator.torch_device_mesh["tp"])
    loader = torch.utils.data.DataLoader(torch.arange(4), batch_size=2)  # type: ignore[arg-type]
    found: tuple[Any, Any, Any] = accelerator.prepare(model, _optimizer(model), loader)
    return found


def loop(folder: str) -> tuple[float, list[int], str, dict[str, Tensor]]:
    """The largest relative difference of losses, norms and weights to one process; the rows of this
    rank's batch; the error of ``save_state``; and the full weights, which ``save_model`` writes
    into ``folder``."""
    torch.set_num_threads(1)
    deepspeed_autotp.install()
    accelerator = _accelerator(activation_checkpointing=True)
    own = make(RUN)
    before = copied(own)
    alone = _optimizer(own)
    model, optimizer, loader = _prepared(accelerator)
    pairs = []
    for step in range(STEPS):
        ids = tokens(step, rows=8)
        expected = loss_of(own, ids)
        expected.backward()
        norm = nn.utils.clip_grad_norm_(own.parameters(), CLIP)
        loss = loss_of(model, ids.chunk(2)[dist.get_rank() // 2])
        accelerator.backward(loss)
        pairs.append((accelerator.clip_grad_norm_(model.parameters(), CLIP), norm))
        total = loss.detach().clone()
        dist.all_reduce(total)
        pairs.append((total / dist.get_world_size(), expected.detach()))
        for each in (alone, optimizer):
            each.step()
            each.zero_grad()
    accelerator.save_model(model, folder)
    saved = raised_error(lambda: accelerator.save_state(str(Path(folder, "state"))))
    deepspeed_autotp.uninstall()
    (rows,) = (batch.tolist() for batch in loader)
    full = deepspeed_autotp.full_state_dict(model)
    numbers = [abs(float(got) / float(wanted) - 1) for got, wanted in pairs]
    return max(*numbers, moved(full, copied(own), before)), rows, saved, full


def loaded_on_rank0() -> str:
    """The error of the first forward where Accelerate gives all ranks the weights of rank 0."""
    model, *_ = _prepared(_accelerator(cpu_ram_efficient_loading=True))
    return raised_error(lambda: model(input_ids=tokens(0)))
