# SPDX-License-Identifier: Apache-2.0
"""A sharded model is saved as the unsharded one is, whole or not at all."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import save_pretrained_ranks as ranks
from tests.support.same_error import same_error
from tests.support.small_disk import mounted_disk
from tests.support.worker_pool import Pool
from tests.support.worker_process import ROOT


@pytest.mark.parametrize(
    ("tp", "parallel", "max_shard_size"),
    [
        (2, True, "20KB"),
        (2, False, "20KB"),
        (3, True, "5GB"),
        pytest.param(4, False, "60KB", marks=pytest.mark.long),
        (4, True, "5GB"),
    ],
)
def test_the_files_are_those_of_the_unsharded_model_and_load(
    pool: Pool, tp: int, parallel: bool, max_shard_size: str, tmp_path: Path
) -> None:
    args = (str(tmp_path), parallel, max_shard_size)
    assert pool.run(ranks.differences, *args, ranks=tp) == [[]] * tp


def test_one_replica_writes_and_only_one_rank_unless_parallel(pool: Pool, tmp_path: Path) -> None:
    written = pool.run(ranks.saves_of_replicas, str(tmp_path), ranks=4)
    assert written == [["model.safetensors"] * 2, ["model.safetensors"], [], []]


def test_every_error_is_the_same_on_every_rank_and_leaves_nothing_behind(
    pool: Pool, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    found = pool.run(ranks.errors, str(tmp_path), ranks=2)
    texts = {key: same_error([rank[key] for rank in found]) for key in found[0]}
    assert texts["left"] == "['closed', 'file']"
    parts = {
        "a file": "is a file, expected a folder",
        "no permission": "Permission denied",
        "no space": "File too large",
        "no space, parallel": "File too large",
        "a size": "5 apples",
        "no model": "got Linear, expected a model of transformers",
        "replaced": "model.norm.weight was replaced after the model was sharded",
    }
    for key, part in parts.items():
        assert part in texts[key], texts[key]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    with mounted_disk(tmp_path, size="256k") as disk:
        yield disk


def test_a_full_disk_keeps_the_checkpoint_that_is_there(pool: Pool, small_disk: Path) -> None:
    (small_disk / "model.safetensors").write_bytes(b"old")
    text = same_error(pool.run(ranks.saves_onto, str(small_disk)))
    assert "No space left on device" in text
    assert [path.name for path in small_disk.iterdir()] == ["model.safetensors"]


def test_a_rank_that_does_not_call_it_is_an_error_that_says_so(pool: Pool, tmp_path: Path) -> None:
    text, _ = pool.run(ranks.called_by_some, str(tmp_path / "new"))
    assert "save_pretrained: some rank did not call it within the timeout" in text
    assert not (tmp_path / "new").exists()


def test_adapters_are_written_as_peft_writes_them(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(ranks.adapters, str(tmp_path)) == [[], []]


def test_a_model_that_is_not_sharded_is_saved_without_a_process_group(
    pool: Pool, tmp_path: Path
) -> None:
    assert pool.run(ranks.unsharded, str(tmp_path), ranks=1) == [[]]


@pytest.mark.long
def test_ranks_that_are_killed_while_they_save_leave_the_old_checkpoint_or_the_new_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killed_saves", "6"],
        cwd=ROOT,
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()[-1].split()) <= {"old", "new"}
