# SPDX-License-Identifier: Apache-2.0
"""What ranks on two hosts do: ``python -m tests.distributed.two_hosts_ranks CASE FOLDER``.

Each writes what it found to ``FOLDER/RANK.json``, and at each step that it has done what it waits
for in ``FOLDER/RANK.step``.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import deepspeed_autotp
from benchmarks.step_calls import Recorder
from deepspeed_autotp.distributed.hosts import this_host
from deepspeed_autotp.distributed.process_group import TPGroup
from tests.support.engine_config import Setting, engine_config
from tests.support.log_records import logged_warnings
from tests.support.loss_curves import (
    RATE,
    own_rows,
    sgd,
    single_losses,
    train_engine,
    worst_difference,
)
from tests.support.small_models import build, tokens

CLIP = 0.5
STEPS = 4
# Of a run that is disturbed, some seconds altogether.
DISTURBED_STEPS, PAUSE = 12, 0.1


def main() -> None:
    case, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo", timeout=_timeout())
    found = CASES[case](Progress(folder))
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _timeout() -> timedelta:
    return timedelta(seconds=float(os.environ.get("TEST_TIMEOUT", "60")))


class Progress:
    """Tells the test which steps are done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / f"{dist.get_rank()}.step"

    def note(self, step: int) -> None:
        self._file.write_text(str(step))


def parity(_: Progress) -> dict[str, Any]:
    """By layout, how far losses and weights are from one process, how TP ranks talk, warnings."""
    found: dict[str, Any] = {
        "inside": _in_a_loop(_mesh("dp", "tp")),
        "across": _in_a_loop(_mesh("tp", "dp")),
    }
    for zero in (1, 2):
        found[f"ZeRO {zero}"] = _in_an_engine(zero)
    return found


def cyclic(_: Progress) -> dict[str, Any]:
    """As above, of an engine whose TP ranks are on two hosts, as ranks alternate between them."""
    return _in_an_engine(2)


def _mesh(*names: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def _single(steps: int = STEPS) -> tuple[nn.Module, list[float]]:
    model = build("llama", tied=False)
    return model, single_losses(model, clip=CLIP, steps=steps)


def _in_a_loop(mesh: DeviceMesh) -> dict[str, Any]:
    reference, expected = _single()
    with logged_warnings() as warnings:
        model = deepspeed_autotp.parallelize(build("llama", tied=False), mesh=mesh["tp"])
    with Recorder() as recorder:
        model(input_ids=tokens(0), labels=tokens(0)).loss.backward()
    model.zero_grad()
    losses = _train(model, mesh.get_group("dp"), STEPS, lambda _: None)
    return _compared(model, losses, reference, expected) | {
        "transports": sorted({call.transport for call in recorder.calls}),
        "warnings": list(warnings),
    }


def _train(
    model: nn.Module, replicas: dist.ProcessGroup, steps: int, after: Callable[[int], object]
) -> list[float]:
    """Losses of the full batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(steps):
        ids = tokens(step).chunk(replicas.size())[dist.get_rank(replicas)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=replicas)
            parameter.grad.div_(replicas.size())
        deepspeed_autotp.clip_grad_norm_(model, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total, group=replicas)
        losses.append(float(total) / replicas.size())
        after(step)
    return losses


def _in_an_engine(zero: int) -> dict[str, Any]:
    reference, expected = _single()
    model = build("llama", tied=False)
    config = engine_config(Setting(tp=2, zero=zero, clip=CLIP))
    with logged_warnings() as warnings:
        engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=sgd(model), config=config)
    ids = own_rows(tokens(0), tp=2)
    with Recorder() as recorder, torch.no_grad():
        engine(input_ids=ids, labels=ids)
    losses = train_engine(engine, tp=2, steps=STEPS)
    found = _compared(engine, losses, reference, expected) | {
        "transports": sorted({call.transport for call in recorder.calls}),
        "warnings": list(warnings),
    }
    engine.destroy()
    return found


def _compared(
    model: Any, losses: list[float], reference: nn.Module, expected: list[float]
) -> dict[str, Any]:
    full = deepspeed_autotp.full_state_dict(model)
    apart = max(float((full[name] - t).abs().max()) for name, t in reference.state_dict().items())
    return {
        "host": this_host().name,
        "losses apart": worst_difference(losses, expected),
        "weights apart": apart,
    }


def sharing(_: Progress) -> dict[str, Any]:
    """For each other rank, whether it is said to be on this host, and whether memory is shared."""
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, this_host())
    found = {}
    for first in range(len(hosts)):
        for second in range(first + 1, len(hosts)):
            handle = dist.new_group([first, second])
            if dist.get_rank() in (first, second):
                assert isinstance(handle, dist.ProcessGroup)
                group = TPGroup(handle)
                group.share_memory()
                with Recorder() as recorder:
                    group.all_reduce(torch.ones(3))
                (call,) = recorder.calls
                other = first + second - dist.get_rank()
                mine, theirs = hosts[dist.get_rank()], hosts[other]
                found[str(other)] = [mine.name == theirs.name, mine == theirs, call.transport]
    return found


def _across() -> tuple[nn.Module, dist.ProcessGroup]:
    """A model over ranks of two hosts, and the ranks that hold the same shards. The groups have the
    timeout of the run, which those of a DeviceMesh do not."""
    tp = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]], timeout=_timeout())[0]
    replicas = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]], timeout=_timeout())[0]
    model = deepspeed_autotp.parallelize(build("llama", tied=False), tp_group=tp)
    return model, replicas


def disturbed(progress: Progress) -> dict[str, Any]:
    """Training with TP across the hosts that goes on for a while: losses against one process."""
    _, expected = _single(DISTURBED_STEPS)
    model, replicas = _across()

    def after(step: int) -> None:
        progress.note(step)
        time.sleep(PAUSE)

    began = time.monotonic()
    losses = _train(model, replicas, DISTURBED_STEPS, after)
    seconds = time.monotonic() - began
    return {"losses apart": worst_difference(losses, expected), "seconds": seconds}


def endless(progress: Progress) -> None:
    """Training that only a fault ends, with TP across the hosts."""
    model, replicas = _across()
    _train(model, replicas, 10**6, progress.note)


def endless_engine(progress: Progress) -> None:
    """As above with DeepSpeed, TP within a host, and no collective but the engine's."""
    model = build("llama", tied=False)
    config = engine_config(Setting(tp=2, zero=1, clip=CLIP))
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=sgd(model), config=config)
    ids = own_rows(tokens(0), tp=2)
    for step in range(10**6):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        progress.note(step)


def elastic(progress: Progress) -> dict[str, Any]:
    """Training that goes on from its last checkpoint, with the ranks that there are: losses of this
    start against one process, and the step that it began with."""
    _, expected = _single(DISTURBED_STEPS)
    model = build("llama", tied=False)
    config = engine_config(Setting(tp=2, zero=1, clip=CLIP))
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=sgd(model), config=config)
    saved = progress.folder / "checkpoint"
    if (saved / "latest").exists():
        engine.load_checkpoint(str(saved))
    first, losses = engine.global_steps, []
    for step in range(first, DISTURBED_STEPS):
        losses += train_engine(engine, tp=2, first=step, steps=1)
        engine.save_checkpoint(str(saved))
        progress.note(step)
        time.sleep(PAUSE)
    return {"first": first, "losses apart": worst_difference(losses, expected[first:])}


CASES: dict[str, Callable[[Progress], Any]] = {
    "parity": parity,
    "cyclic": cyclic,
    "sharing": sharing,
    "disturbed": disturbed,
    "endless": endless,
    "endless_engine": endless_engine,
    "elastic": elastic,
}

if __name__ == "__main__":
    main()
