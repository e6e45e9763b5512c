# SPDX-License-Identifier: Apache-2.0
"""What the ranks do: process groups from a model's first to its last moment."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

import deepspeed_autotp
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.transport import ShardSizes, open_transport
from tests.support.engine_config import Setting, engine_config
from tests.support.log_records import LoggedMessages
from tests.support.models_on_rank0 import weights_on_rank0
from tests.support.open_resources import open_resources
from tests.support.raised_error import raised_error
from tests.support.small_models import build, tokens

# One key/value head on several ranks: its gradient is summed over some of the ranks only.
SHARED_HEADS: dict[str, Any] = {"num_key_value_heads": 2}


def made(**changes: Any) -> nn.Module:
    return build("llama", tied=False, **changes)


def step(model: Any) -> float:
    loss = model(input_ids=tokens(0), labels=tokens(0)).loss
    (model.backward if isinstance(model, DeepSpeedEngine) else Tensor.backward)(loss)
    return float(loss.detach())


@contextmanager
def device_only() -> Iterator[dist.ProcessGroup]:
    """A group that takes no CPU tensors, as NCCL's, of ranks that have a GPU's RNG."""
    handle: dist.ProcessGroup = dist.new_group(backend="cuda:gloo")
    with (
        mock.patch("torch.cuda.get_rng_state", lambda device: torch.get_rng_state()),
        mock.patch("torch.cuda.set_rng_state"),
    ):
        yield handle


class Watch:
    """Counts the process groups that are made, and collectives over the whole world."""

    def __init__(self) -> None:
        self.groups = 0
        self.over_world = 0

    def __enter__(self) -> "Watch":
        c10d = dist.distributed_c10d
        make, all_gather = c10d._new_process_group_helper, c10d.all_gather
        world = dist.get_world_size()

        def noted_make(*args: Any, **named: Any) -> Any:
            self.groups += 1
            return make(*args, **named)

        def noted_all_gather(received: list[Any], mine: Any, group: Any = None) -> None:
            self.over_world += len(received) == world
            all_gather(received, mine, group=group)

        self._patches = [
            mock.patch.object(c10d, "_new_process_group_helper", noted_make),
            mock.patch.object(dist, "all_gather", noted_all_gather),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()


def exchanges(how: str) -> int:
    """How many all-gathers over all ranks sharding takes, TP 2 x DP 2."""
    model = made()
    with Watch() as seen:
        if how == "parallelize":
            deepspeed_autotp.parallelize(model, tp_size=2)
        elif how == "sequence parallel":
            config = {"sequence_parallel": True}
            deepspeed_autotp.parallelize(model, tp_size=2, config=config)
        elif how == "fallback":  # blocks that differ are planned and checked again
            for layer in model.model.layers:
                layer.mlp.register_forward_hook(lambda m, a, y: y * m.up_proj.weight.shape[0])
            deepspeed_autotp.parallelize(model, tp_size=2)
        elif how == "scatter":
            with weights_on_rank0(2):
                model = made()
            config = {"self_check": False}
            deepspeed_autotp.parallelize(model, tp_size=2, config=config)
        else:
            with mock.patch("deepspeed.initialize", side_effect=KeyError("stop here")):
                config = engine_config(Setting(tp=2, zero=0, clip=0.0))
                raised_error(lambda: deepspeed_autotp.initialize(model=model, config=config))
    return seen.over_world


def groups_while_training(device: bool) -> tuple[int, int, int]:
    """Groups made while sharding, in two training steps, and in 20 checks of replicas."""
    with device_only() as handle:
        ways: dict[str, Any] = {"tp_group": handle} if device else {"tp_size": 4}
        # No self-check, which would run a backward pass before.
        ways["config"] = {"self_check": False}
        with Watch() as sharding:
            model = deepspeed_autotp.parallelize(made(**SHARED_HEADS), **ways)
        with Watch() as training:
            for _ in range(0 if device else 2):
                step(model)
        with Watch() as checking:
            for _ in range(20):
                deepspeed_autotp.check_replicas(model)
    return sharding.groups, training.groups, checking.groups


def groups_of_refusal() -> tuple[str, int]:
    """What is said where only rank 0 of four has weights, and the groups that were made."""
    with weights_on_rank0(dist.get_world_size()):
        model = made()
    with Watch() as seen:
        said = raised_error(lambda: deepspeed_autotp.parallelize(model, tp_size=2))
    return said, seen.groups


def left_by_checks(times: int) -> tuple[dict[str, int], dict[str, int]]:
    """What is open before and after many checks of replicas."""
    with device_only() as handle:
        model = deepspeed_autotp.parallelize(made(), tp_group=handle)
        deepspeed_autotp.check_replicas(model)
        before = open_resources()
        for _ in range(times):
            deepspeed_autotp.check_replicas(model)
        return before, open_resources()


def _one_life(how: str, number: int) -> None:
    """A model from the first to the last moment of its groups."""
    if how == "refused":  # after the groups were made
        config = {"partition_config": {"layer_specs": [], "use_default_specs": False}}
        raised_error(lambda: deepspeed_autotp.parallelize(made(), tp_size=2, config=config))
        return
    if how in ("engine", "failed engine"):
        config = engine_config(Setting(tp=2, zero=0, clip=0.0))
        failing = mock.patch("deepspeed.DeepSpeedEngine", side_effect=KeyError("no engine"))
        with failing if how == "failed engine" else nullcontext():
            model = made()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            try:
                engine, *_ = deepspeed_autotp.initialize(
                    model=model, optimizer=optimizer, config=config
                )
            except KeyError:
                return
        step(engine)
        engine.destroy()
        return
    model = deepspeed_autotp.parallelize(made(**SHARED_HEADS), tp_size=dist.get_world_size())
    step(model)
    if how == "destroyed":
        deepspeed_autotp.destroy(model)
    elif how == "collected at another time" and dist.get_rank() == number % 2:
        HELD.append(model)
    else:
        HELD.clear()
    del model
    gc.collect()


# Models that a rank still has when others have lost them.
HELD: list[nn.Module] = []


def lives(how: str, times: int) -> list[dict[str, int]]:
    """What is open after two models, after more of them, and of one kind of group of a user."""
    found = []
    for number in range(times + 2):
        if number in (2, times + 1):
            found.append(open_resources())
        _one_life(how, number)
    # torch names it by the groups that a rank has.
    dist.barrier(dist.new_group(use_local_synchronization=True))
    HELD.clear()
    return found


# Models of runs that were ended.
LEFT: list[nn.Module] = []


def left_models(number: int) -> None:
    """Keep models of this run, whose groups end with it, or with 0 forget all that were kept."""
    if not number:
        LEFT.clear()
        gc.collect()
    for _ in range(number):
        LEFT.append(deepspeed_autotp.parallelize(made(), tp_size=dist.get_world_size()))


def collected_engine() -> list[float]:
    """Losses before and after one rank has lost its engine, but not its model."""
    model = made(**SHARED_HEADS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed_autotp.initialize(
        model=model, optimizer=optimizer, config=engine_config(Setting(tp=2, zero=0, clip=0.0))
    )
    losses = [step(model)]
    if dist.get_rank() == 1:
        del engine
        gc.collect()
    deepspeed_autotp.check_replicas(model)
    return [*losses, step(model)]


def copies() -> tuple[list[float], list[str]]:
    """Losses of a model whose copy was destroyed, beside those of one that has no copy; and what a
    destroyed model says."""
    first, second = (
        deepspeed_autotp.parallelize(made(**SHARED_HEADS), tp_size=dist.get_world_size())
        for _ in range(2)
    )
    twin = copy.deepcopy(first)
    deepspeed_autotp.destroy(twin)
    losses = [step(first), step(second)]
    deepspeed_autotp.destroy(first)
    deepspeed_autotp.destroy(first)
    said = [
        raised_error(lambda: step(first)),
        raised_error(lambda: deepspeed_autotp.full_state_dict(first)),
        raised_error(lambda: deepspeed_autotp.check_replicas(first)),
        raised_error(lambda: deepspeed_autotp.destroy(made())),
    ]
    return [*losses, step(second)], said


def given_group() -> tuple[list[float], bool, int]:
    """Losses of two models in one group of the user, one destroyed between them; whether the group
    is still there; and the shared memories that are not."""
    handle = dist.new_group()
    before = open_resources()["shared memories"]
    first, second = (
        deepspeed_autotp.parallelize(made(**SHARED_HEADS), tp_group=handle) for _ in range(2)
    )
    losses = [step(first)]
    deepspeed_autotp.destroy(first)
    losses.append(step(second))
    deepspeed_autotp.destroy(second)
    total = torch.ones(())
    dist.all_reduce(total, group=handle)
    left = open_resources()["shared memories"] - before
    return losses, float(total) == dist.get_world_size(), left


def engines() -> list[float]:
    """Losses of a model in an engine, and in another one after that was destroyed."""
    model = made(**SHARED_HEADS)
    losses = []
    for _ in range(2):
        config = engine_config(Setting(tp=2, zero=0, clip=0.0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)
        losses.append(step(engine))
        deepspeed_autotp.check_replicas(engine)
        engine.destroy()
    return losses


def by_device() -> list[str]:
    """Where collectives leave tensors in a group with a backend for each device; the meta device
    stands for a GPU, from which nothing can be copied to the CPU."""
    handle = dist.new_group(backend="cpu:gloo,meta:fake")
    group = TPGroup(handle)
    found = []
    for device in ("cpu", "meta"):
        x = torch.ones(2, 2, device=device)
        shapes = [(2, 2)] * group.size
        group.broadcast(x)
        work, rows = group.start_reduce_scatter(x, (1, 1))
        work.wait()
        with open_transport(group, x.device) as transport:
            sizes = ShardSizes("x", (x.nbytes,) * group.size)
            transport.scatter(None if group.rank else [x, x], torch.empty_like(x), sizes)
        results = [group.all_reduce(x), *group.all_gather(x, shapes), rows]
        found += [tensor.device.type for tensor in results]
    sums = group.all_reduce(torch.ones(1)).tolist()
    return [*found, str(sums)]


def other_replica() -> tuple[int, list[str]]:
    """The plan where only the second of two TP groups has blocks that differ, and what is said."""
    model = made()
    if dist.get_rank() >= 2:
        full = model.config.intermediate_size
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(
                lambda m, a, y: y if m.up_proj.weight.shape[0] == full else y * 2
            )
    with LoggedMessages() as said:
        deepspeed_autotp.parallelize(model, tp_size=2)
    return deepspeed_autotp.tensor_parallel(model).plan.hash, list(said)
