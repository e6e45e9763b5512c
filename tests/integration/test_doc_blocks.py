# SPDX-License-Identifier: Apache-2.0
"""The Python blocks of docs/ run on two ranks, as they stand but for sizes and devices."""

from pathlib import Path

import pytest

from tests.integration.doc_blocks_ranks import BLOCKS, SCRIPTS, run
from tests.support.doc_blocks import all_blocks
from tests.support.worker_pool import Pool

TEXTS = {b.place: b.text for b in all_blocks() if b.language == "python" and not b.fragment}
# DeepSpeed and Accelerate keep state for the rest of a process.
ALONE = ("docs/training.md: With DeepSpeed", "docs/trainer.md: Accelerate")
JOBS: dict[str, list[str]] = {}
for place in BLOCKS:
    JOBS.setdefault(place if place in ALONE else place.partition(":")[0], []).append(place)


def test_every_python_block_is_run_or_a_fragment() -> None:
    assert TEXTS.keys() == BLOCKS.keys() | SCRIPTS


@pytest.mark.parametrize("job", JOBS)
def test_a_block_does_what_its_page_says(pool: Pool, job: str, tmp_path: Path) -> None:
    blocks = {place: TEXTS[place] for place in JOBS[job]}
    assert pool.run(run, blocks, str(tmp_path), ranks=2, timeout=110) == [JOBS[job]] * 2
