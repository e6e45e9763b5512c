# SPDX-License-Identifier: Apache-2.0
"""Saving a sharded model: seconds, and private memory of a rank above what it had before.

    python -m benchmarks.save --tp 2,4

A Llama of 1.1 billion parameters in bfloat16, over gloo on this machine: gathered on TP rank 0,
written by every rank, and DeepSpeed's ways with its AutoTP: ``save_16bit_model``, which writes the
shards of one rank, and the consolidated state dict that ``Trainer.save_model`` hands to
``save_pretrained``. The folder is empty each time. DeepSpeed's ways return before their files are
on the disk, ours afterwards.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.support.worker_pool import Pool

WAYS = ("gathered", "parallel", "consolidated", "save_16bit_model")
# Seconds between two looks at the memory.
PAUSE = 0.005
# Seconds, MB of private memory, GB in the folder.
Measured = tuple[float, float, float]


def save(way: str, layers: int, folder: str, rounds: int) -> dict[str, list[Measured]]:
    """By what was done, the rounds. ``way`` is who shards the model."""
    if way == "deepspeed":
        done = _deepspeed(layers)
    else:
        import deepspeed_autotp

        model = _model(layers)
        deepspeed_autotp.parallelize(
            model, tp_size=dist.get_world_size(), config={"self_check": False}
        )
        done = {"gathered": _ours(model, parallel=False), "parallel": _ours(model, parallel=True)}
    found: dict[str, list[Measured]] = {name: [] for name in done}
    for _ in range(rounds):
        for name, work in done.items():
            found[name].append(_round(work, folder))
    return found


def _ours(model: nn.Module, *, parallel: bool) -> Callable[[str], object]:
    import deepspeed_autotp

    return lambda folder: deepspeed_autotp.save_pretrained(model, folder, parallel=parallel)


def _deepspeed(layers: int) -> dict[str, Callable[[str], object]]:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 0, "stage3_gather_16bit_weights_on_model_save": True},
        "tensor_parallel": {"autotp_size": dist.get_world_size()},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=_model(layers), config=config)

    def consolidated(folder: str) -> None:
        state = engine._consolidated_16bit_state_dict()
        if dist.get_rank() == 0:
            engine.module.save_pretrained(folder, state_dict=state)

    return {"consolidated": consolidated, "save_16bit_model": engine.save_16bit_model}


def _model(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    rotary = type(model.model.rotary_emb)(config)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = rotary
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model  # type: ignore[no-any-return]


def _round(work: Callable[[str], object], folder: str) -> Measured:
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    with Peak() as peak:
        began = time.perf_counter()
        work(folder)
        dist.barrier()
        seconds = time.perf_counter() - began
    written = 0
    if dist.get_rank() == 0:  # which removes them before the next round
        written = sum(path.stat().st_size for path in Path(folder).rglob("*"))
    return seconds, peak.most - peak.before, written / 1e9


class Peak:
    """Private memory of this process in MB: before, and at most."""

    def __enter__(self) -> Peak:
        self.before = self.most = _private()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(PAUSE):
            self.most = max(self.most, _private())


def _private() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1.024e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", default="2,4", help="TP sizes, up to 4")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--folder", help="a folder on the disk to write to")
    options = parser.parse_args()
    ways = options.ways.split(",")
    print(f"{'TP':>2}  {'way':16} {'seconds':>8} {'slowest':>8} {'MB, one rank':>13} {'GB':>5}")
    for tp in map(int, options.tp.split(",")):
        found: dict[str, list[list[Measured]]] = {}
        with tempfile.TemporaryDirectory(prefix="autotp-save-", dir=options.folder) as folder:
            for way in dict.fromkeys("ours" if way in WAYS[:2] else "deepspeed" for way in ways):
                pool = Pool(tp)
                args = (way, options.layers, str(Path(folder, "saved")), options.rounds)
                ranks = pool.run("benchmarks.save:save", *args, ranks=tp, timeout=900)
                pool.close()
                found |= {name: [rank[name] for rank in ranks] for name in ranks[0]}
        for way in ways:
            seconds = [max(rank[i][0] for rank in found[way]) for i in range(options.rounds)]
            memory = max(mb for rank in found[way] for _, mb, _ in rank)
            size = found[way][0][0][2]
            times = f"{statistics.median(seconds):8.2f} {max(seconds):8.2f}"
            print(f"{tp:2}  {way:16} {times} {memory:13.0f} {size:5.2f}", flush=True)


if __name__ == "__main__":
    main()
