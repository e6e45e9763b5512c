# SPDX-License-Identifier: Apache-2.0
"""A layout survives its file, and shards of one layout make those of any other."""

import json

import pytest
import torch

from deepspeed_autotp._core import Plan, reshard
from deepspeed_autotp.checkpoint.layout import Layout, resharded
from deepspeed_autotp.state.sharded_model import shard_of
from tests.support.core_llama import llama, preset


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_layout_is_read_as_it_was_written(ranks: int) -> None:
    layout = Layout.of_plan(Plan(llama(), preset(), ranks=ranks))
    assert Layout.from_json(json.loads(json.dumps(layout.json()))) == layout


@pytest.mark.parametrize("old", [1, 2, 3, 4])
@pytest.mark.parametrize("new", [1, 2, 3, 4])
def test_shards_of_any_layout_make_those_of_any_other(old: int, new: int) -> None:
    before, after = (Plan(llama(), preset(), ranks=ranks) for ranks in (old, new))
    layouts = [Layout.of_plan(plan) for plan in (before, after)]
    for entry, wanted in zip(before.entries, after.entries, strict=True):
        full = torch.randn(entry.shape)
        shards = [
            shard_of(full, entry=entry, rank=rank) if entry.is_sharded else full
            for rank in range(old)
        ]
        for rank in range(new):
            made = resharded(
                [lambda shard=shard: shard.reshape(-1) for shard in shards],  # type: ignore[misc]
                old=layouts[0].parameters[entry.name],
                new=layouts[1].parameters[entry.name],
                rank=rank,
            )
            expected = shard_of(full, entry=wanted, rank=rank) if wanted.is_sharded else full
            assert torch.equal(made, expected)


def test_elements_that_no_rank_holds_are_an_error() -> None:
    with pytest.raises(ValueError, match="no old rank holds element 4"):
        reshard([[0, 4]], [2, 4])
    with pytest.raises(TypeError, match="sources"):
        reshard([["a"]], [2, 4])  # type: ignore[list-item]
