# SPDX-License-Identifier: Apache-2.0
"""Tokens of a random chain, of which a model learns something for thousands of steps."""

import torch
from torch import Tensor

VOCABULARY = 96
FOLLOWERS = 4  # of each token, all as likely: no loss is below log 4 = 1.386


def chain_tokens(step: int, *, rows: int = 4, length: int = 16) -> Tensor:
    """``[rows, length]`` token ids, the same on every rank."""
    draw = torch.Generator().manual_seed(7)
    followers = torch.randint(0, VOCABULARY, (VOCABULARY, FOLLOWERS), generator=draw)
    draw.manual_seed(1000 + step)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=draw)
    choices = torch.randint(0, FOLLOWERS, (rows, length), generator=draw)
    for place in range(1, length):
        ids[:, place] = followers[ids[:, place - 1], choices[:, place]]
    return ids
