# SPDX-License-Identifier: Apache-2.0
"""A trained BERT of twelve heads gives the embeddings of one process at every TP size."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.support.worker_process import ROOT

pytestmark = pytest.mark.long

# By TP size, the most that a rank may hold.
_SHARES = {2: 0.51, 3: 0.35, 4: 0.27, 6: 0.19, 12: 0.1}


@pytest.fixture(scope="module")
def embedded() -> Any:
    """One process for all TP sizes, whose ranks are forks of it: twelve would take a minute to
    import torch one by one."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.real_weights_ranks", *map(str, _SHARES)],
        cwd=ROOT,
        env={
            **os.environ,
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # DeepSpeed prints on its own


def test_the_weights_are_trained(embedded: Any) -> None:
    alone = torch.tensor(embedded["alone"])
    alike, *others = (alone @ alone.T)[0, 1:].tolist()
    assert alike > 0.6 and max(others) < 0.2


@pytest.mark.parametrize("ranks", _SHARES)
def test_embeddings_are_those_of_one_process(embedded: Any, ranks: int) -> None:
    alone = torch.tensor(embedded["alone"])
    found = embedded["tp_sizes"][str(ranks)]
    assert len(found) == ranks
    for own in found:
        torch.testing.assert_close(torch.tensor(own["embeddings"]), alone, rtol=0, atol=1e-5)
        assert own["heads"] == 12 // ranks
        assert own["share"] < _SHARES[ranks]
        assert own["warnings"] == []


def test_weights_that_were_loaded_as_shards_and_saved_are_bitwise_the_same(embedded: Any) -> None:
    assert embedded["round_trips"] == {"2": [], "3": [], "4": []}
