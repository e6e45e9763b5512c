# SPDX-License-Identifier: Apache-2.0
"""Shards go from one GPU to another and back through NCCL itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepspeed_autotp.distributed import nccl
from deepspeed_autotp.native import operators

pytestmark = pytest.mark.gpu


def test_nccl_is_found_and_takes_the_configuration() -> None:
    """A communicator of one rank, which needs no other GPU, is made, used and closed."""
    found = nccl.find()
    assert found.reason == "" and found.version_code >= 21400 and not found.is_cpu_stand_in
    ops, made = operators.loaded(), torch.zeros(128, dtype=torch.uint8)
    ops.nccl_id_(made, found.path)
    assert made.any()
    index = torch.cuda.current_device()
    handle = ops.nccl_make(found.path, made, 0, 1, index, 60.0)
    ops.nccl_exchange(handle, "scatter", [], [], [], [])
    ops.nccl_close(handle)
    with pytest.raises(ValueError, match="the communicator is closed"):
        ops.nccl_exchange(handle, "scatter", [], [], [], [])


def test_memory_of_the_cpu_is_refused() -> None:
    made = torch.zeros(128, dtype=torch.uint8)
    with pytest.raises(ValueError, match="got the CPU, expected a GPU"):
        operators.loaded().nccl_make(nccl.find().path, made, 0, 1, -1, 60.0)


MOVES = """
import torch, torch.distributed as dist

dist.init_process_group("nccl")
torch.cuda.set_device(dist.get_rank())
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.transport import ShardSizes, NcclTransport, open_transport

group = TPGroup(dist.group.WORLD)
first = group.rank == 0
for where in ("cuda", "cpu"):
    parts = [torch.arange(3000000 * rank, device=where) for rank in range(1, 1 + group.size)]
    own = torch.zeros_like(parts[group.rank], device="cuda")
    back, everywhere = ([torch.zeros_like(part) for part in parts] for _ in range(2))
    sizes = ShardSizes("parts", tuple(part.nbytes for part in parts))
    with open_transport(group, own.device) as moving:
        assert isinstance(moving, NcclTransport)
        moving.scatter(parts if first else None, own, sizes)
        moving.gather(own, back if first else None, sizes)
        moving.all_gather(own, everywhere, sizes)
    assert torch.equal(own.to(where), parts[group.rank])
    assert not first or all(map(torch.equal, back, parts))
    assert all(map(torch.equal, everywhere, parts))
dist.destroy_process_group()
print("moved", flush=True)
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_go_from_one_gpu_to_another_and_back(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(MOVES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node=2", str(script)],
        cwd=tmp_path,
        env={**os.environ, "DS_ACCELERATOR": "cuda"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.count("moved") == 2, done.stdout + done.stderr
