# SPDX-License-Identifier: Apache-2.0
"""Ranks that fall out of step, fork, or are interrupted."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import deepspeed_autotp
from deepspeed_autotp.api import pipeline
from deepspeed_autotp.distributed.model_groups import group_timeout
from deepspeed_autotp.sharding.conversion import Conversion
from tests.support.engine_config import Setting, engine_config
from tests.support.loss_curves import single_losses
from tests.support.model_snapshot import Snapshot
from tests.support.raised_error import raised_error
from tests.support.small_models import build, tokens

# Seconds of a group whose ranks wait for one that does not come.
TIMEOUT = 3.0


def sharded(transport: str) -> Any:
    os.environ["AUTOTP_SHARED_MEMORY"] = str(int(transport == "shared memory"))
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    config = {"self_check": False}
    return deepspeed_autotp.parallelize(build("llama", tied=False), tp_group=group, config=config)


def out_of_step(fault: str, transport: str) -> tuple[float, str]:
    """How far losses of three batches are from those of one process, where rank 1 does the second
    otherwise, and the error."""
    full, model, apart = build("llama", tied=False), sharded(transport), [0.0]

    def train() -> None:
        for step in range(3):
            here = fault if step == 1 and dist.get_rank() == 1 else ""
            if here == "leaves out a batch":
                continue
            ids = tokens(7 if here == "has another batch" else step)
            if here == "repeats a forward":
                model(input_ids=ids, labels=ids)
            loss = model(input_ids=ids, labels=ids).loss
            if here != "leaves out a backward":
                loss.backward()
            expected = full(input_ids=tokens(step), labels=tokens(step)).loss
            apart.append(abs(float((loss - expected).detach())))

    said = raised_error(train)
    return max(apart), said


def forked(transport: str) -> tuple[str, list[float]]:
    """What a fork of a rank that calls the model reads, and losses before and after."""
    model = sharded(transport)

    def loss() -> float:
        return float(model(input_ids=tokens(0), labels=tokens(0)).loss.detach())

    losses = [loss()]
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writes, raised_error(loss).encode())
        os._exit(0)
    os.close(writes)
    said = os.fdopen(reads).read()
    os.waitpid(pid, 0)
    return said, [*losses, loss()]


@contextmanager
def alarms(seconds: float) -> Iterator[list[int]]:
    """The signals that have come, of which there is one every so many seconds."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def signalled(transport: str) -> tuple[list[float], list[float], int]:
    """Losses with signals while ranks wait, and without; and how many signals there were."""
    expected = single_losses(sharded(transport), clip=0.0)
    model = sharded(transport)
    # Rank 1 comes late to each step.
    model.register_forward_pre_hook(lambda *_: time.sleep(0.05 * dist.get_rank()))
    with alarms(0.002) as seen:
        losses = single_losses(model, clip=0.0)
    return losses, expected, len(seen)


def beside_loader(transport: str) -> tuple[list[float], list[float]]:
    """Losses of batches from workers of a DataLoader that start while the model is sharded, and
    those without."""
    model, batches = sharded(transport), [tokens(step)[0] for step in range(4)]

    def losses(workers: int) -> list[float]:
        loader = DataLoader(batches, batch_size=2, num_workers=workers)
        found = []
        for _ in range(2):  # in the second epoch workers start anew
            found += [float(model(input_ids=ids, labels=ids).loss.detach()) for ids in loader]
        return found

    return losses(2), losses(0)


def threads(transport: str) -> tuple[list[list[float]], list[list[float]]]:
    """Losses of two models that train in two threads at the same time, and of them in turn."""
    expected = [single_losses(sharded(transport), clip=0.0) for _ in range(2)]
    models, found = [sharded(transport) for _ in range(2)], [[0.0], [0.0]]

    def train(number: int) -> None:
        found[number] = single_losses(models[number], clip=0.0)

    running = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return found, expected


def engine_timeouts() -> list[float]:
    """Seconds of the default group and of the engine's, by what was made in between."""
    model = build("llama", tied=False)
    before = set(dist.distributed_c10d._world.pg_map)
    config = engine_config(Setting(tp=2, zero=1, clip=1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)
    made = [each for each in dist.distributed_c10d._world.pg_map if each not in before]
    assert made
    assert dist.group.WORLD is not None
    found = [group_timeout(each) for each in (dist.group.WORLD, *made)]
    engine.destroy()
    return [each.total_seconds() for each in found if each is not None]


def interrupted(where: str) -> tuple[bool, list[str]]:
    """Whether a model is as before KeyboardInterrupt at a moment of sharding, and what it says
    then: as it is called, and as it is sharded again."""
    model = build("llama", tied=False)
    before = Snapshot(model)
    owner, name = {
        "before the commit": (pipeline, "_share_weights"),
        "in the commit": (Conversion, "commit"),
        "after the commit": (pipeline, "broadcast_rng_state"),
    }[where]
    stopped = mock.patch.object(owner, name, side_effect=KeyboardInterrupt)
    with stopped, suppress(KeyboardInterrupt):
        deepspeed_autotp.parallelize(model, tp_size=2)
    try:
        before.check()
        return True, []
    except AssertionError:
        ids = tokens(0)
        said = [raised_error(lambda: model(input_ids=ids, labels=ids))]
        return False, [*said, raised_error(lambda: deepspeed_autotp.parallelize(model, tp_size=2))]
