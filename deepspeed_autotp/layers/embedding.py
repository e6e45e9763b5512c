# SPDX-License-Identifier: Apache-2.0
"""Embeddings whose weight is sharded.

T is the number of tokens, V the vocabulary, H the hidden size, N the attention heads, R the ranks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed_autotp.distributed.autograd_collectives import (
    gather_from_tp_region,
    reduce_from_tp_region,
)
from deepspeed_autotp.layers.drawn_weights import ResetInFull
from deepspeed_autotp.layers.embedding_lookup import lookup
from deepspeed_autotp.layers.layer_sharding import sharding_of


class VocabularyEmbedding(ResetInFull, nn.Embedding):
    """Embedding whose vocabulary is sharded.

    ids [T]        replicated
    w   [V/R, H]   this rank's rows
    y   [T, H]     = sum over ranks of w[ids] where the rank holds the id, else 0

    forward   all-reduce of the output
    backward  no communication

    An id outside the vocabulary is an IndexError on the CPU, and a row of NaN on a GPU.
    """

    def forward(self, ids: Tensor) -> Tensor:
        s = sharding_of(self)
        layout, group = s.layout, s.group
        start, rows = layout.runs[group.rank]
        if self.weight.shape[0] != rows:
            raise ValueError(
                f"an embedding of {layout.size} rows has {self.weight.shape[0]} on rank "
                f"{group.rank} of {group.size}, expected {rows}: it was resized after the "
                "model was sharded; call resize_token_embeddings before"
            )
        found = lookup(self.weight, ids, start=start, size=layout.size, padding=self.padding_idx)
        return reduce_from_tp_region(found, group)


class HiddenEmbedding(ResetInFull, nn.Embedding):
    """Embedding whose hidden dimension is sharded.

    ids [T]        replicated
    w   [V, H/R]   this rank's columns
    y   [T, H]     = w[ids] of all ranks, concatenated

    forward   all-gather of the output
    backward  no communication
    """

    def forward(self, ids: Tensor) -> Tensor:
        y = F.embedding(ids, self.weight, self.padding_idx)
        s = sharding_of(self)
        return gather_from_tp_region(y, s.layout, s.group)


class HeadEmbedding(ResetInFull, nn.Embedding):
    """Embedding with a column for each head of attention whose heads are sharded.

    ids [T]        replicated
    w   [V, N/R]   the columns of this rank's heads
    y   [T, N/R]   = w[ids]

    forward   no communication
    backward  no communication
    """

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight, self.padding_idx)
