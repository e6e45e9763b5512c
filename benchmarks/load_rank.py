# SPDX-License-Identifier: Apache-2.0
"""One rank of benchmarks/load.py: a checkpoint loaded sharded, in one of three ways."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_EVERY = 0.004


@dataclass(frozen=True, slots=True)
class Loaded:
    """``seconds`` until all ranks had the model, and ``written`` until each had written all its
    parameters once, as a first step does, which took ``cpu`` seconds of this rank's processor;
    ``peak`` is the most private memory above that of
    the start, ``held`` the bytes of this rank's parameters, ``read`` those read of the files."""

    seconds: float
    written: float
    cpu: float
    peak: int
    held: int
    read: int | None


class PrivateMemory:
    """RssAnon of this process, sampled while the context lasts."""

    def __enter__(self) -> PrivateMemory:
        self._start = self.peak = _private()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        self.peak = max(self.peak, _private()) - self._start

    def _sample(self) -> None:
        while not self._ends.wait(_EVERY):
            self.peak = max(self.peak, _private())


def _private() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def _ours(checkpoint: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    import deepspeed_autotp

    size = dist.get_world_size()
    return deepspeed_autotp.from_pretrained(AutoModelForCausalLM, checkpoint, tp_size=size)


def _unchecked(checkpoint: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    import deepspeed_autotp

    return deepspeed_autotp.from_pretrained(
        AutoModelForCausalLM,
        checkpoint,
        tp_size=dist.get_world_size(),
        config={"self_check": False},
    )


def _transformers(checkpoint: str) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    plan = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    model: nn.Module = AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=plan)
    return model


def _deepspeed(checkpoint: str) -> nn.Module:
    """Every rank loads all; DeepSpeed then shards. Its optimizer is one without state."""
    import deepspeed
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 0},
        "tensor_parallel": {"autotp_size": dist.get_world_size()},
    }
    deepspeed.tp_model_init(model, tp_size=dist.get_world_size(), dtype=torch.bfloat16)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    inner: nn.Module = engine.module
    return inner


WAYS: Mapping[str, Callable[[str], nn.Module]] = {
    "ours": _ours,
    "ours, no self-check": _unchecked,
    "transformers TP": _transformers,
    "DeepSpeed AutoTP": _deepspeed,
}


def load(way: str, checkpoint: str, small: str) -> Loaded:
    """Load ``checkpoint``, after a small one of the same kind, for which modules are imported."""
    WAYS[way](small)
    read: list[int] = []
    if way.startswith("ours"):
        _count_reads(read)
    dist.barrier()
    start, used = time.perf_counter(), time.process_time()
    with PrivateMemory() as memory:
        model = WAYS[way](checkpoint)
        dist.barrier()
        seconds = time.perf_counter() - start
        own = [_local(p.detach()) for p in {id(p): p for p in model.parameters()}.values()]
        for parameter in own:
            parameter.mul_(1)
        dist.barrier()
        written, used = time.perf_counter() - start, time.process_time() - used
    held = sum(parameter.nbytes for parameter in own)
    return Loaded(seconds, written, used, memory.peak, held, sum(read) if read else None)


def _local(parameter: Any) -> torch.Tensor:
    """Of a DTensor this rank's shard."""
    to_local = getattr(parameter, "to_local", None)
    found: torch.Tensor = parameter if to_local is None else to_local()
    return found


def _count_reads(read: list[int]) -> None:
    from deepspeed_autotp.loading.read_plan import ReadPlan

    run = ReadPlan.run

    def counted(self: Any, files: Any, advance: Callable[[int], object]) -> None:
        read.append(self.bytes_to_read)
        run(self, files, advance)

    ReadPlan.run = counted  # type: ignore[method-assign]
