# SPDX-License-Identifier: Apache-2.0
"""The pool answers by rank, starts every job fresh, and names the rank that went wrong."""

import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support.worker_pool import Pool, PoolError


def where() -> tuple[int, int, int]:
    total = torch.ones(())
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), int(total)


def echo(value: Any) -> Any:
    return value


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is unwell")
    dist.all_reduce(torch.ones(()))


def fail_with_an_engine() -> None:
    engine = make_engine()
    if dist.get_rank() == 1:
        raise ValueError("after the engine")
    engine(torch.ones(1, 8))
    dist.all_reduce(torch.ones(()))


def hang_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(3600)
    dist.all_reduce(torch.ones(()))


def crash_on_rank_zero() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.all_reduce(torch.ones(()))


def answer_late() -> str:
    time.sleep(2.0)
    return "late"


def return_a_function() -> Any:
    return lambda: None


def warn() -> None:
    warnings.warn("look here", stacklevel=1)


def variables() -> dict[str, str]:
    os.environ["LEFT_BEHIND"] = "1"
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: os.environ[name] for name in names}


def variable(name: str) -> str | None:
    return os.environ.get(name)


def draw() -> torch.Tensor:
    return torch.rand(4)


def worker_pid() -> int:
    return os.getpid()


def make_engine() -> Any:
    import deepspeed

    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        },
    )
    return engine


def linear_of_zero3() -> str:
    from deepspeed import zero

    with zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        nn.Linear(2, 2)
    return where_linear_is()


def where_linear_is() -> str:
    return str(nn.functional.linear.__module__)


def train(steps: int) -> list[float]:
    """Mean loss over all ranks, per step; every rank has its own two rows."""
    engine = make_engine()
    data = torch.randn(dist.get_world_size(), 2, 8)[dist.get_rank()]
    losses = []
    for _ in range(steps):
        loss = engine(data).pow(2).mean()
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    return losses


def shared_memory_after_training() -> list[str]:
    """DeepSpeed names its buffers after the port, which tells them from those of other runs."""
    train(1)
    port = os.environ["MASTER_PORT"]
    return [file.name for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*{port}*")]


def open_files_and_threads() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def deepspeed_state() -> tuple[Any, ...]:
    from deepspeed import comm
    from deepspeed.utils import groups

    return comm.comm.cdb, groups.mesh_device, groups._WORLD_GROUP, groups.mpu


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_results_come_by_rank_over_a_group_of_exactly_these_ranks(pool: Pool, ranks: int) -> None:
    assert pool.run(where, ranks=ranks) == [(rank, ranks, ranks) for rank in range(ranks)]


def test_a_function_may_be_named_by_module_and_name(pool: Pool) -> None:
    assert pool.run("tests.unit.test_worker_pool:echo", "hello") == ["hello", "hello"]


def test_tensors_go_there_and_back_bitwise(pool: Pool) -> None:
    tensor = torch.randn(5, 3).to(torch.bfloat16)
    for result in pool.run(echo, {"w": tensor}):
        assert torch.equal(result["w"], tensor)


def test_the_same_processes_serve_one_job_after_the_other(pool: Pool) -> None:
    assert pool.run(worker_pid) == pool.run(worker_pid)


def test_launcher_variables_are_set_and_nothing_stays_behind(pool: Pool) -> None:
    first, second = pool.run(variables)
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert first["WORLD_SIZE"] == first["LOCAL_SIZE"] == "2"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert pool.run(variable, "LEFT_BEHIND") == [None, None]


def test_given_variables_hold_for_one_job(pool: Pool) -> None:
    assert pool.run(variable, "COLOUR", env={"COLOUR": "blue"}) == ["blue", "blue"]
    assert pool.run(variable, "COLOUR") == [None, None]


def test_every_job_starts_with_the_same_rng_state_on_every_rank(pool: Pool) -> None:
    first, second = pool.run(draw)
    again, _ = pool.run(draw)
    assert torch.equal(first, second)
    assert torch.equal(first, again)


def test_a_rank_that_raises_is_named_with_its_traceback(pool: Pool) -> None:
    with pytest.raises(PoolError, match="rank 1 raised ValueError: rank one is unwell") as caught:
        pool.run(fail_on_rank_one)
    assert (caught.value.rank, caught.value.kind) == (1, "ValueError")
    assert "in fail_on_rank_one" in str(caught.value)


def test_peers_of_a_rank_that_raised_are_free_at_once(pool: Pool) -> None:
    pids = pool.run(worker_pid)
    began = time.monotonic()
    with pytest.raises(PoolError, match="rank one is unwell"):
        pool.run(fail_on_rank_one)
    with pytest.raises(PoolError, match="after the engine"):
        pool.run(fail_with_an_engine)
    assert time.monotonic() - began < 10
    assert pool.run(worker_pid) == pids


def test_a_rank_that_hangs_is_named_with_its_stack_and_the_pool_lives_on(pool: Pool) -> None:
    with pytest.raises(PoolError, match="rank 1 did not answer within 2 s") as caught:
        pool.run(hang_on_rank_one, timeout=2)
    assert caught.value.kind == "timeout"
    assert "in hang_on_rank_one" in str(caught.value)
    assert pool.run(where) == [(0, 2, 2), (1, 2, 2)]


def test_a_job_that_is_interrupted_leaves_no_answer_to_the_next(pool: Pool) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR2, interrupt)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR2))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.run(answer_late)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR2, before)
    assert pool.run(echo, "next") == ["next", "next"]


def test_a_rank_that_crashes_is_named_with_its_signal_and_stack(pool: Pool) -> None:
    with pytest.raises(PoolError, match="rank 0 died with signal SIGSEGV") as caught:
        pool.run(crash_on_rank_zero)
    assert (caught.value.rank, caught.value.kind) == (0, "died")
    assert "in crash_on_rank_zero" in str(caught.value)
    assert pool.run(where) == [(0, 2, 2), (1, 2, 2)]


def test_a_result_that_cannot_be_sent_is_an_error_and_not_a_hang(pool: Pool) -> None:
    with pytest.raises(PoolError, match="return_a_function"):
        pool.run(return_a_function)


def test_a_warning_of_a_test_is_an_error_in_a_worker(pool: Pool) -> None:
    with pytest.raises(PoolError, match="UserWarning: look here"):
        pool.run(warn)


def test_a_function_that_no_worker_can_import_is_refused(pool: Pool) -> None:
    with pytest.raises(ValueError, match="not a top-level function"):
        pool.run(lambda: None)


@pytest.mark.parametrize("ranks", [0, 5])
def test_more_ranks_than_workers_are_refused(pool: Pool, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"ranks is {ranks}; the pool has 1 to 4"):
        pool.run(where, ranks=ranks)


def test_deepspeed_trains_at_four_ranks_and_at_two_in_the_same_processes(pool: Pool) -> None:
    first = pool.run(train, 3, ranks=4)
    assert first == pool.run(train, 3, ranks=4)
    assert first[0] == first[3]
    assert first[0][-1] < first[0][0]
    halves = pool.run(train, 3, ranks=2)
    assert halves[0] != first[0]
    assert pool.run(deepspeed_state) == [(None, None, None, None)] * 2


def test_functions_that_zero3_replaces_are_those_of_torch_for_the_next_job(pool: Pool) -> None:
    own = where_linear_is()
    replaced = pool.run(linear_of_zero3)
    assert pool.run(where_linear_is) == [own] * 2
    assert own not in replaced


def test_engines_of_earlier_jobs_hold_no_sockets_and_no_threads(pool: Pool) -> None:
    pool.run(train, 1)
    before = pool.run(open_files_and_threads)
    for _ in range(3):
        pool.run(train, 1)
    assert pool.run(open_files_and_threads) == before


def test_deepspeed_leaves_no_shared_memory_behind(pool: Pool) -> None:
    assert pool.run(shared_memory_after_training) == [[], []]
