# SPDX-License-Identifier: Apache-2.0
"""The figures of benchmarks/load.py, on a smaller checkpoint: what a rank reads, and its memory."""

from pathlib import Path

from benchmarks.load import write_checkpoint
from tests.support.worker_pool import Pool

# The embedding of the checkpoint, its largest tensor.
LARGEST = 32000 * 1024 * 2


def test_a_rank_reads_its_shard_and_has_little_more_memory(
    deepspeed_imported: None, pool: Pool, tmp_path: Path
) -> None:
    folders = {size: tmp_path / size for size in ("150M", "small")}
    for size, folder in folders.items():
        write_checkpoint(folder, size)
    large, small = map(str, folders.values())
    for found in pool.run("benchmarks.load_rank:load", "ours", large, small):
        assert found.read == found.held > 150e6
        assert found.peak < 1.05 * found.held + LARGEST
        assert 0 < found.seconds <= found.written and found.cpu > 0
