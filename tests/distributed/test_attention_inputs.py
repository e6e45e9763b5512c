# SPDX-License-Identifier: Apache-2.0
"""What attention is given for each head is sharded to the heads of a rank, and nothing else is."""

import pytest
import torch
from torch import Tensor, nn

from deepspeed_autotp._core import Kind
from deepspeed_autotp.interop.module_state import set_state
from deepspeed_autotp.layers.class_swap import wrapper_class
from deepspeed_autotp.layers.layer_sharding import LayerSharding
from tests.support.column_shards import even_widths, forward_context, layout_of, world_group
from tests.support.worker_pool import Pool

HEADS, QUERIES = 4, 3


class Attention(nn.Module):
    """Gives what came in beside its input."""

    def forward(self, x: Tensor, alibi: Tensor) -> Tensor:
        return alibi


def given(rows: int, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """An alibi of these sizes, and what attention over ``rows`` rows sees of it."""
    group = world_group()
    module = Attention()
    module.__class__ = wrapper_class(module, Kind.HEADS)
    layout = layout_of(even_widths(HEADS))
    set_state(module, LayerSharding(group=group, context=forward_context(group), layout=layout))
    alibi = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    return alibi, module(torch.zeros(rows, QUERIES, 8), alibi)


@pytest.mark.parametrize("rows", [1, 3, HEADS, 2 * HEADS])
def test_an_alibi_of_rows_is_not_taken_for_one_of_heads(pool: Pool, rows: int) -> None:
    for rank, (alibi, seen) in enumerate(pool.run(given, rows, (rows * HEADS, 1, QUERIES))):
        own = alibi.unflatten(0, (rows, HEADS)).chunk(2, dim=1)[rank]
        assert torch.equal(seen, own.flatten(0, 1))
    for alibi, seen in pool.run(given, rows, (rows, QUERIES, QUERIES)):
        assert torch.equal(seen, alibi)


def test_an_alibi_of_heads_alone_is_sharded(pool: Pool) -> None:
    for rank, (alibi, seen) in enumerate(pool.run(given, 8, (HEADS, 1, QUERIES))):
        assert torch.equal(seen, alibi.chunk(2)[rank])
