# SPDX-License-Identifier: Apache-2.0
"""Ends two ranks by SIGKILL at moments spread over a save, and loads what is there.

    python -m tests.support.killed_saves 20

Each moment has a save that replaces a checkpoint of several files, parallel and gathered by turn.
Every weight of a checkpoint has the same value, so that a mixture of two shows. The ranks are forks
of this process, which has imported everything.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

import deepspeed_autotp
from tests.support.pretrained_models import build_pretrained

RANKS = 2
TIMEOUT = 60.0


def main() -> None:
    moments = int(sys.argv[1])
    torch.set_num_threads(1)  # forks of a process with threads may hang
    model()
    with tempfile.TemporaryDirectory(prefix="autotp-killed-") as root:
        folder = Path(root, "checkpoint")
        whole = [saved(folder, 1.0, parallel=parallel, after=None) for parallel in (True, False)]
        value, found = 1.0, []
        for moment in range(moments):
            parallel = moment % 2 == 0
            after = 1.5 * whole[moment % 2] * (moment + 0.5) / moments  # the last ones afterwards
            saved(folder, value + 1, parallel=parallel, after=after)
            new = value_of(folder)
            assert new in (value, value + 1), (moment, value, new)
            found.append("new" if new > value else "old")
            value = new
        saved(folder, 0.5, parallel=True, after=None)
        assert value_of(folder) == 0.5
        left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert not left, left
        print(" ".join(found))


def saved(folder: Path, value: float, *, parallel: bool, after: float | None) -> float:
    """Save a model of weights that are ``value``, ended ``after`` seconds of the save itself.

    Returns how long it took.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="autotp-meeting-") as meeting:
        pipes = [context.Pipe(duplex=False) for _ in range(RANKS)]
        ranks = [
            context.Process(target=serve, args=(rank, meeting, folder, value, parallel, pipe[1]))
            for rank, pipe in enumerate(pipes)
        ]
        for rank in ranks:
            rank.start()
        for pipe, _ in pipes:
            assert pipe.poll(TIMEOUT)
            assert pipe.recv() == "saving"
        began = time.monotonic()
        if after is not None:
            time.sleep(after)
            for rank in ranks:
                assert rank.pid is not None
                os.kill(rank.pid, signal.SIGKILL)
        for rank in ranks:
            rank.join(TIMEOUT)
        taken = time.monotonic() - began
        assert after is not None or all(rank.exitcode == 0 for rank in ranks)
        return taken


def serve(rank: int, meeting: str, folder: Path, value: float, parallel: bool, pipe: Any) -> None:
    store = dist.FileStore(str(Path(meeting, "store")), RANKS)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    ours = model()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(value)
    deepspeed_autotp.parallelize(ours, tp_size=RANKS, config={"self_check": False})
    dist.barrier()
    pipe.send("saving")
    deepspeed_autotp.save_pretrained(ours, folder, max_shard_size="4MB", parallel=parallel)
    dist.barrier()
    os._exit(0)


def model() -> torch.nn.Module:
    return build_pretrained("llama", hidden_size=256, intermediate_size=1024, vocab_size=4096)


def value_of(folder: Path) -> float:
    """The value of every weight that a loader would find."""
    json.loads((folder / "config.json").read_text())
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    values = set()
    for file in sorted(set(weight_map.values())):
        with safe_open(folder / file, "pt") as opened:
            names = set(opened.keys())
            assert names == {name for name, where in weight_map.items() if where == file}
            values |= {float(v) for name in names for v in opened.get_tensor(name).unique()}
    assert len(values) == 1, values
    return values.pop()


if __name__ == "__main__":
    main()
