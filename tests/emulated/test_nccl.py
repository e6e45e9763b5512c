# SPDX-License-Identifier: Apache-2.0
"""Shards go from one rank to all and back through NCCL, here a stand-in for CPU memory."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed_autotp.cli import doctor
from deepspeed_autotp.distributed import nccl
from tests.emulated import nccl_ranks as jobs
from tests.support.fake_nccl import compiled
from tests.support.worker_pool import Pool

FAILED_BEFORE = "a call of this communicator has failed before; restart all its ranks"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("nccl") / "libstandin.so")


@pytest.fixture
def stand_in(library: Path, tmp_path: Path) -> Mapping[str, str]:
    """The environment in which the stand-in is NCCL."""
    return {"AUTOTP_NCCL": str(library), "FAKE_NCCL_FOLDER": str(tmp_path)}


def test_the_library_is_found_with_its_version(
    stand_in: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOTP_NCCL", stand_in["AUTOTP_NCCL"])
    assert nccl.find() == nccl.NcclLibrary("", stand_in["AUTOTP_NCCL"], "2.27.3", 22703, True)
    used = dict(doctor.examine()["used on this machine"])
    assert used["NCCL for shards of weights"] == f"2.27.3, {stand_in['AUTOTP_NCCL']}"


@pytest.mark.parametrize(
    ("number", "words"), [(2804, "2.8.4"), (21399, "2.13.99"), (30100, "3.1.0")]
)
def test_another_version_is_not_used(
    library: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    monkeypatch.setenv("AUTOTP_NCCL", str(library))
    monkeypatch.setenv("FAKE_NCCL_VERSION", str(number))
    expected = f"{library} is NCCL {words}; expected 2.14 or a later NCCL 2; "
    assert nccl.find().reason.startswith(expected)
    assert dict(doctor.examine()["used on this machine"])["NCCL for shards of weights"].startswith(
        f"none: {expected}"
    )


def test_a_missing_library_comes_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTP_NCCL", "/nowhere/libnccl.so.2")
    assert nccl.find().reason == (
        "the file of AUTOTP_NCCL cannot be opened: /nowhere/libnccl.so.2: cannot open "
        "shared object file: No such file or directory"
    )
    monkeypatch.setenv("AUTOTP_NCCL", "")
    assert nccl.find().reason == "AUTOTP_NCCL is empty, which turns NCCL off; unset it to use NCCL"


def test_a_library_that_was_asked_for_and_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AUTOTP_NCCL", "")
    nccl.check_environment()
    monkeypatch.setenv("AUTOTP_NCCL", "/nowhere/libnccl.so.2")
    with pytest.raises(ValueError, match="AUTOTP_NCCL: the file of AUTOTP_NCCL cannot be"):
        nccl.check_environment()


def test_another_library_is_not_taken_for_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTP_NCCL", "libm.so.6")
    assert nccl.find().reason == (
        "what was opened for NCCL is another library: it has no ncclGetVersion; install a torch "
        "with CUDA, or set AUTOTP_NCCL to the file of NCCL"
    )


def test_a_library_that_lacks_a_function_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = compiled(tmp_path / "libpart.so", "-DncclCommFinalize=renamed")
    monkeypatch.setenv("AUTOTP_NCCL", str(part))
    assert nccl.find().reason.startswith(f"{part} has no ncclCommFinalize; ")


LOOKS = """
import ctypes, sys
from deepspeed_autotp.native import operators

find = operators.loaded().nccl_find
print(find(sys.argv[1])[1])
ctypes.CDLL(sys.argv[2])
print(find(sys.argv[1])[1])
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has loaded NCCL already")
def test_one_that_is_loaded_goes_before_one_that_is_installed(
    library: Path, tmp_path: Path
) -> None:
    loaded = compiled(tmp_path / "libloaded.so", "-Wl,-soname,libnccl.so.2")
    environment = {key: value for key, value in os.environ.items() if key != "AUTOTP_NCCL"}
    done = subprocess.run(
        [sys.executable, "-c", LOOKS, str(library), str(loaded)],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(library), str(loaded)], done.stderr


@pytest.mark.parametrize("ranks", [2, 4])
def test_unequal_and_empty_tensors_arrive_whole(
    pool: Pool, stand_in: Mapping[str, str], ranks: int
) -> None:
    assert pool.run(jobs.unequal, 1 << 20, ranks=ranks, env=stand_in) == [[]] * ranks


def test_a_long_tensor_goes_in_chunks(pool: Pool, stand_in: Mapping[str, str]) -> None:
    most = {**stand_in, "FAKE_NCCL_MOST": "1000"}
    assert pool.run(jobs.unequal, 1000, ranks=4, env=most) == [[]] * 4


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_model_goes_out_and_comes_back_through_it(
    pool: Pool, stand_in: Mapping[str, str], tmp_path: Path, ranks: int
) -> None:
    expected = sorted([f"closed-{rank}" for rank in range(ranks)] * 3)
    for same, closed in pool.run(
        jobs.scatter_save_and_gather, str(tmp_path), ranks=ranks, env=stand_in
    ):
        assert all(same) and closed == expected, "scattered, gathered by all, by rank 0"


def failed(pool: Pool, env: Mapping[str, str], fault: str, rank: int, seconds: float) -> list[Any]:
    """Of both ranks, error and seconds of two exchanges where ``fault`` is on one rank."""
    return pool.run(jobs.failures, rank, seconds, env={**env, "FAKE_NCCL_FAULT": fault})


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("send", 'NCCL says "invalid usage": the pointer is not registered'),
        ("group", 'NCCL says "internal error": the group was not launched'),
        ("late", 'NCCL says "remote error": the cable was pulled'),
    ],
)
def test_an_error_of_nccl_is_in_the_message(
    pool: Pool, stand_in: Mapping[str, str], tmp_path: Path, fault: str, words: str
) -> None:
    first, other = failed(pool, stand_in, fault, 0, 1.0)
    assert first[0][0] == f"rank 0 of 2: scatter: sending to rank 1: {words}"
    assert first[1][0] == f"rank 0 of 2: {FAILED_BEFORE}"
    assert other[1][0] == f"rank 1 of 2: {FAILED_BEFORE}"
    assert all(seconds < 0.5 for _, seconds in (first[1], other[1]))
    assert sorted(path.name for path in tmp_path.glob("*/aborted-*")) == ["aborted-0", "aborted-1"]


def test_a_peer_that_never_comes_is_an_error_in_time(
    pool: Pool, stand_in: Mapping[str, str]
) -> None:
    (first, again), *_, absent = pool.run(jobs.without_a_peer, ranks=4, env=stand_in)
    assert absent == []
    assert first[0].startswith(
        "rank 0 of 4: scatter: sending to rank 1, sending to rank 2, sending to rank 3 is not "
        "done after 0.5 seconds, the timeout; a rank has ended"
    )
    assert 0.4 < first[1] < 5 and again[1] < 0.4
    assert again[0] == f"rank 0 of 4: {FAILED_BEFORE}"


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("fault", ["send", "group", "late", "hang"])
def test_the_error_of_a_failed_exchange_arrives(
    pool: Pool, stand_in: Mapping[str, str], fault: str, rank: int
) -> None:
    env = {**stand_in, "FAKE_NCCL_FAULT": fault}
    found = pool.run(jobs.carried_to_failure, rank, 4.0, ranks=3, env=env, timeout=40.0)
    for said, seconds in found:
        assert "NCCL says" in said or "is not done after 2 seconds" in said or said == "PeerFailed"
        assert seconds < 10
    assert sum(said != "PeerFailed" for said, _ in found) >= 1


def test_a_stream_that_hangs_is_an_error_on_both_sides(
    pool: Pool, stand_in: Mapping[str, str]
) -> None:
    first, other = failed(pool, stand_in, "hang", 1, 1.0)
    assert "scatter: sending to rank 1 is not done after 0.5 seconds" in first[0][0]
    assert "scatter: receiving from rank 0 is not done after 0.5 seconds" in other[0][0]


@pytest.mark.parametrize(
    ("fault", "rank", "words"),
    [
        ("init", 1, 'NCCL says "internal error": no memory on the device'),
        ("id", 0, "NCCL makes no id for a communicator: internal error. no network"),
    ],
)
def test_where_it_does_not_start_the_group_moves_the_shards(
    pool: Pool, stand_in: Mapping[str, str], fault: str, rank: int, words: str
) -> None:
    env = {**stand_in, "FAKE_NCCL_FAULT": fault}
    found = pool.run(jobs.carried_anyway, rank, 1.0, env=env)
    assert [name for name, _ in found] == ["ProcessGroupTransport"] * 2
    (said,) = found[rank][1]
    assert said.startswith(
        "NCCL failed to initialize, using torch.distributed to transfer the weights: "
    )
    assert words in said


@pytest.mark.parametrize("job", [jobs.other_version, jobs.one_gpu])
def test_ranks_that_cannot_use_it_together_go_without(
    pool: Pool, stand_in: Mapping[str, str], job: Any
) -> None:
    assert pool.run(job, ranks=3, env=stand_in) == [("ProcessGroupTransport", [])] * 3


def test_ranks_without_it_go_without(pool: Pool) -> None:
    env = {"AUTOTP_NCCL": ""}
    assert pool.run(jobs.carried_anyway, 0, 5.0, env=env) == [("ProcessGroupTransport", [])] * 2


@pytest.mark.parametrize(
    ("numbers", "devices", "reason"),
    [
        ([22703, 0, 0], [5, 0, 0], "rank 1 cannot use NCCL"),
        ([22703, 22800], [5, 6], "the ranks have different NCCL versions: [22703, 22800], by"),
        ([22703] * 4, [8, 5, 7, 5], "ranks 1 and 3 have the same GPU"),
        ([22703] * 2, [5, 6], ""),
    ],
)
def test_the_reason_to_go_without_names_the_rank(
    numbers: list[int], devices: list[int], reason: str
) -> None:
    found = nccl._mismatch(numbers, devices)
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_calls_after_the_end_are_refused(pool: Pool, stand_in: Mapping[str, str]) -> None:
    assert (
        pool.run(jobs.after_close, env=stand_in)
        == [["the communicator is closed; expected the handle of an open one"] * 2] * 2
    )


@pytest.mark.parametrize(("fault", "how"), [("", "closed"), ("close", "aborted")])
def test_a_communicator_ends_with_its_use(
    pool: Pool, stand_in: Mapping[str, str], tmp_path: Path, fault: str, how: str
) -> None:
    env = {**stand_in, "FAKE_NCCL_FAULT": fault}
    expected = [[f"{how}-0", f"{how}-1"]] * 2
    assert pool.run(jobs.ended, str(tmp_path), env=env) == expected
