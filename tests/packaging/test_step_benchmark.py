# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a training step counts what is sent, and measures the step without it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from benchmarks.step import Setting, save
from benchmarks.step_calls import Call, Recorder, removed
from benchmarks.step_rank import Inspected, Job, Measured, Times
from benchmarks.step_rows import Round, row_of
from tests.support.worker_pool import Pool

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--hidden=32", "--heads=4", "--kv-heads=2", "--layers=1", "--vocabulary=64", "--sequence=8"]


def record_calls() -> list[Call]:
    alone = dist.new_subgroups(group_size=1)[0]
    whole, part = torch.ones(6), torch.ones(2, dtype=torch.bfloat16)
    with Recorder() as recorder:
        dist.all_reduce(whole)
        dist.all_reduce(whole, group=alone)
        dist.all_gather([torch.empty_like(part) for _ in range(2)], part)
        dist.reduce_scatter_single(torch.empty(3), whole)
        functional.wait_tensor(functional.all_reduce(whole, "sum", dist.group.WORLD))
        weight = torch.ones(3, requires_grad=True)
        weight.register_hook(lambda grad: dist.all_reduce(grad.clone()))
        weight.sum().backward()
    return recorder.calls


def test_every_collective_is_counted_once_with_its_bytes_and_ranks(pool: Pool) -> None:
    expected = [
        Call("all-reduce", 24, 2, "gloo"),
        Call("all-reduce", 24, 1, "gloo"),
        Call("all-gather", 4, 2, "gloo"),
        Call("reduce-scatter", 24, 2, "gloo"),
        Call("all-reduce", 24, 2, "gloo"),
        Call("all-reduce", 12, 2, "gloo"),
    ]
    assert pool.run(record_calls) == [expected] * 2


def take_away_twice() -> list[float]:
    value, seen = torch.ones(()), []
    group = dist.new_group()
    for _ in range(2):
        with removed():
            dist.all_reduce(value, group=group)
            pending = dist.all_reduce(value, async_op=True)
            pending.wait()
            value = functional.all_reduce(value, "sum", group) + 0
        seen.append(float(value))
        dist.all_reduce(value, group=group)
        seen.append(float(value))
    return seen


def test_removed_collectives_do_nothing_and_come_back(pool: Pool) -> None:
    assert pool.run(take_away_twice) == [[1.0, 2.0, 2.0, 4.0]] * 2


def inspected(*calls: Call) -> list[Inspected]:
    return [Inspected({"forward": list(calls), "backward": [], "update": []}, 1, 2)]


def turn(seconds: float, *, loss: float = 2.0) -> Round:
    return Round([loss], seconds, 1.0, seconds, processor=2 * seconds, processor_over_bare=3.0)


def measured(steps: list[float], bare: list[float]) -> Measured:
    """Of a rank that works half of the time."""
    timed = [[Times(each, each / 2) for each in seconds] for seconds in (steps, bare)]
    return Measured([1.0], *timed, None)


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [{"a": turn(a), "b": turn(b)} for a, b in ((1.0, 2.0), (10.0, 5.0), (1.0, 1.0))]
    row = row_of("b", 8, inspected(), inspected(), rounds, first="a")
    assert (row.over_first, row.seconds) == (1.0, 2.0)
    assert (row.processor_over_first, row.processor) == (1.0, 4.0)


def test_a_layer_is_the_difference_that_one_more_makes() -> None:
    head, block = Call("all-gather", 8, 2, "gloo"), Call("all-reduce", 4, 2, "gloo")
    alone = Call("all-reduce", 100, 1, "gloo")
    rounds = [{"a": turn(1.0)}]
    row = row_of(
        "a", 8, inspected(head, block, alone), inspected(head, block, block), rounds, first="a"
    )
    assert row.layer["forward"].calls == {"all-reduce": 1}
    assert row.layer["forward"].size == 4
    assert row.alone == 1


def test_a_loss_that_is_not_a_number_differs_from_every_other() -> None:
    rounds = [{"a": turn(1.0), "b": turn(1.0, loss=math.nan)}]
    assert row_of("b", 8, inspected(), inspected(), rounds, first="a").loss_difference == math.inf


def test_a_step_has_ended_when_the_slowest_rank_has() -> None:
    ranks = [measured(steps, [1.0, 1.0]) for steps in ([1.0, 5.0], [3.0, 1.0])]
    assert Round.of(ranks).seconds == 4.0
    assert Round.of(ranks).processor == 2.5, "the work of all ranks counts"


def test_a_step_is_compared_with_the_bare_one_after_it() -> None:
    ranks = [measured([2.0, 40.0, 3.0], [1.0, 20.0, 3.0])]
    assert Round.of(ranks).over_bare == 2.0
    assert Round.of(ranks).processor_over_bare == 2.0


def save_tiny(folder: str) -> None:
    save(Setting(32, 1, 4, 2, 48, 64, micro_batch=2, tp=2, steps=1, rounds=1), 1, Path(folder))


@pytest.mark.parametrize(("way", "ranks"), [("sequence-parallel", 2), ("fsdp", 4)])
def test_ways_with_other_parallelism_train_the_same_model(
    pool: Pool, tmp_path: Path, way: str, ranks: int
) -> None:
    pool.run(save_tiny, str(tmp_path), ranks=1)
    losses = []
    for name, count in (("parallelize", 2), (way, ranks)):
        job = Job(name, str(tmp_path), rows=2, sequence=8, vocabulary=64, pairs=0, inspect=True)
        found = pool.run("benchmarks.step_rank:measure", job, ranks=count)
        losses.append(found[0].losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert found[0].inspected.calls["forward"] != []


KINDS = [
    ("deepspeed,transformers,parallelize", "transformers TP by gloo, ours, parallelize by shared"),
    ("parallelize,parallelize-logits,sequence-parallel", "All are carried by shared memory."),
    ("transformers-fsdp,fsdp", "ours, fully_shard by gloo and shared memory."),
]


@pytest.mark.long
@pytest.mark.timeout(600)  # up to eight processes start and import everything
@pytest.mark.parametrize(("kinds", "said"), KINDS)
def test_a_comparison_runs_and_its_losses_agree(tmp_path: Path, kinds: str, said: str) -> None:
    record, chart = tmp_path / "step.json", tmp_path / "step.svg"
    command = [sys.executable, "-m", "benchmarks.step", *TINY, "--steps=2", "--rounds=1"]
    command += [f"--kinds={kinds}", f"--json={record}"]
    done = subprocess.run(
        [*command, f"--chart={chart}"], cwd=ROOT, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in " ".join(done.stdout.split())
    rows = {row["way"]: row for row in json.loads(record.read_text())["rows"]}
    assert list(rows) == kinds.split(",")
    # The four sums over hidden states of [2, 8, 32] that no way can do without.
    needed = 4 * 2 * 8 * 32 * 4
    for row in rows.values():
        assert sum(phase["size"] for phase in row["layer"].values()) >= needed
        assert row["losses"][-1] < row["losses"][0]
        assert row["bare"] > 0
        assert row["peak"] > row["held"]
    assert chart.read_text().startswith("<svg")
