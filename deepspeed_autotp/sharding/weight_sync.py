# SPDX-License-Identifier: Apache-2.0
"""The weights of TP rank 0 on every rank of its group, before they are sharded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.bitsandbytes import is_4bit, tensors_of_4bit
from deepspeed_autotp.planning.model_description import Description

_log = logging.getLogger("deepspeed_autotp")

# Elements of each parameter that are compared. Weights that were drawn or loaded differently
# differ nearly everywhere, so a few show it; reading all of them would cost a pass over the model.
_SAMPLE = 64


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    taken = flat[:: max(1, flat.numel() // _SAMPLE)].cpu().contiguous()
    return bytes(taken.view(torch.uint8).numpy())


def sample_digest(tensors: Sequence[Tensor]) -> str:
    """A hash of shapes and of some elements of each tensor."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{list(tensor.shape)}".encode() + _sample(tensor))
    return digest.hexdigest()


def _nothing() -> None:
    pass


def broadcast_weights(
    description: Description, group: TPGroup, *, agreement: Agreement, keep: bool
) -> Callable[[], None]:
    """Give every rank the weights of TP rank 0, where the ranks have different ones.

    As data parallelism does; shards of different models would make no model. ``agreement`` is over
    the ranks of ``group``, whatever other groups hold. The function
    returned restores the ranks' own weights, of which a copy was kept with ``keep``.
    """
    model = description.modules[""]
    parameters = list(dict.fromkeys(description.parameters))
    scales = [each for p in parameters if is_4bit(p) for each in tensors_of_4bit(p)]
    tensors = [*parameters, *scales, *model.buffers()]
    return broadcast_tensors(type(model).__name__, tensors, group, agreement=agreement, keep=keep)


@torch.no_grad()
def broadcast_tensors(
    what: str, tensors: Sequence[Tensor], group: TPGroup, *, agreement: Agreement, keep: bool
) -> Callable[[], None]:
    """As ``broadcast_weights``, of some tensors of ``what``."""
    if len(set(agreement.exchange(sample_digest(tensors)))) == 1:
        return _nothing
    if group.rank == 0:
        _log.warning(
            "the ranks %s have different weights of %s; all take those of rank %d",
            list(group.global_ranks),
            what,
            group.global_ranks[0],
        )
    before = [tensor.detach().clone() for tensor in tensors] if keep and group.rank else []

    @torch.no_grad()
    def restore() -> None:
        for tensor, own in zip(tensors, before, strict=False):
            tensor.detach().copy_(own)

    try:
        for tensor in tensors:
            full = tensor.detach().contiguous()
            group.broadcast(full)
            if group.rank:
                tensor.detach().copy_(full)
    except BaseException:  # a rank that is gone, or an interrupt
        restore()
        raise
    return restore
