# SPDX-License-Identifier: Apache-2.0
"""What has to be equal on all ranks of a group: whole weights before, replicas after.

Random numbers count, too: a dropout mask over replicated activations must be the same.
"""

from __future__ import annotations

import hashlib
import logging

import torch
from torch import Tensor, nn

from deepspeed_autotp import interop
from deepspeed_autotp.agree import Agreement
from deepspeed_autotp.describe import Description
from deepspeed_autotp.group import TPGroup
from deepspeed_autotp.sharded import tensor_parallel

_log = logging.getLogger("deepspeed_autotp")

# Elements of each parameter that are compared. Weights that were drawn or loaded differently
# differ nearly everywhere, so a few tell; reading all of them would cost a pass over the model.
_SAMPLE = 64


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    taken = flat[:: max(1, flat.numel() // _SAMPLE)].cpu().contiguous()
    return bytes(taken.view(torch.uint8).numpy())


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(_sample(tensor))
    return digest.hexdigest()


@torch.no_grad()
def share_weights(description: Description, group: TPGroup, *, agreement: Agreement) -> None:
    """Give every rank the first rank's weights, where the ranks hold different ones.

    As data parallelism does; shards of different models would make no model.
    """
    model = description.modules[""]
    tensors = [*dict.fromkeys(description.parameters), *model.buffers()]
    mine = (group.global_ranks[0], _digest(tensors))
    everyone = agreement.exchange(mine)
    # The same answer on every rank of a group, whatever other groups hold.
    if len({digest for first, digest in everyone if first == mine[0]}) == 1:
        return
    _log.warning(
        "the ranks hold different weights of %s; taking those of rank %d",
        type(model).__name__,
        group.global_ranks[0],
    )
    for tensor in tensors:
        whole = tensor.data.contiguous()
        group.broadcast(whole)
        tensor.data.copy_(whole)


def share_random_state(group: TPGroup) -> None:
    """Give every rank the first rank's random state, on the host and on the group's device."""
    state = torch.get_rng_state()
    sent = state.to(group.device)
    group.broadcast(sent)
    torch.set_rng_state(sent.cpu())
    if group.device.type == "cuda":
        sent = torch.cuda.get_rng_state(group.device).to(group.device)
        group.broadcast(sent)
        torch.cuda.set_rng_state(sent.cpu(), group.device)


@torch.no_grad()
def check_replicas(model_or_engine: nn.Module) -> None:
    """Compare every replicated parameter over the tensor-parallel ranks, bit by bit.

    Every rank calls it. RuntimeError on every rank, naming the parameters that drifted apart.
    """
    state = tensor_parallel(model_or_engine)
    agreement = Agreement(state.group.handle)
    digests = {}
    for entry, parameter in zip(state.plan.entries, state.parameters, strict=True):
        if entry.dim < 0 and entry.tied_to < 0:
            with interop.gathered([parameter]):
                held = parameter.detach().cpu().contiguous().reshape(-1)
            digests[entry.name] = hashlib.blake2b(
                bytes(held.view(torch.uint8).numpy()), digest_size=16
            ).hexdigest()
    everyone = agreement.exchange(digests)
    drifted = [n for n in digests if len({theirs[n] for theirs in everyone}) > 1]
    if drifted:
        raise RuntimeError(
            f"{len(drifted)} replicated parameters differ between the tensor-parallel ranks "
            f"{list(state.group.global_ranks)}: {', '.join(drifted[:5])}"
        )
