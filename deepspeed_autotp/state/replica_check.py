# SPDX-License-Identifier: Apache-2.0
"""What has to be equal on all ranks of a TP group: replicated parameters, batches, RNG states.

A dropout mask over replicated activations must be the same, or the replicas drift apart.
"""

from __future__ import annotations

import hashlib
import logging

import torch
from torch import Tensor, nn

from deepspeed_autotp import interop
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.state.tensor_parallel import tensor_parallel

_log = logging.getLogger("deepspeed_autotp")

# Bytes of a hash that the ranks exchange.
_DIGEST = 16
# How many names an error lists.
_NAMED = 5


def share_random_state(group: TPGroup, *, device: torch.device) -> None:
    """Give every rank the first rank's random state, on the host and on ``device``.

    ``device`` is where training will be: ``group`` may move host tensors, as the model lies
    there still.
    """
    sent = torch.get_rng_state().to(group.device)
    group.broadcast(sent)
    torch.set_rng_state(sent.cpu())
    if device.type == "cuda":
        sent = torch.cuda.get_rng_state(device).to(group.device)
        group.broadcast(sent)
        torch.cuda.set_rng_state(sent.cpu(), device)


class FirstCall:
    """A hook of a sharded model: in its first call the ranks compare what they start from.

    ValueError on every rank, before the call, when they are given different tensors: each would
    hold a part of another batch's activations, and the sums over the ranks would mean nothing.
    Random states that differ, as after ``manual_seed(rank)``, become the first rank's, or dropout
    over what all ranks hold would differ.
    """

    def __init__(self, group: TPGroup) -> None:
        self._group = group
        self._done = False

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        if self._done or torch.compiler.is_compiling():  # a graph is not the place to compare
            return
        self._done = True
        group = self._group
        digest = hashlib.blake2b(digest_size=_DIGEST)
        for name, value in (*enumerate(args), *sorted(kwargs.items())):
            if isinstance(value, Tensor):
                digest.update(f"{name} {list(value.shape)} {value.dtype} {_hash(value)};".encode())
        device = next(module.parameters()).device
        mine = digest.digest() + _random_digest(device)
        sent = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(group.device)
        everyone = torch.stack(group.all_gather(sent, [sent.shape] * group.size))
        batches, numbers = (everyone == everyone[0]).split(_DIGEST, dim=1)
        if not batches.all():
            raise ValueError(
                f"the ranks {list(group.global_ranks)} share one {type(module).__name__} and have "
                "to be given the same batch, but their first batches differ. Draw or load by "
                f"dist.get_rank() // {group.size}, the number of the replica, not by the rank."
            )
        if not numbers.all():
            share_random_state(group, device=device)
            if group.rank == 0:
                _log.warning(
                    "the ranks %s share one %s, but were seeded differently; taking the random "
                    "state of rank %d. Seed by the number of the replica, not by the rank.",
                    list(group.global_ranks),
                    type(module).__name__,
                    group.global_ranks[0],
                )


def _random_digest(device: torch.device) -> bytes:
    digest = hashlib.blake2b(bytes(torch.get_rng_state().numpy()), digest_size=_DIGEST)
    if device.type == "cuda":
        digest.update(bytes(torch.cuda.get_rng_state(device).numpy()))
    return digest.digest()


def compare_first_call(model: nn.Module, group: TPGroup) -> None:
    """Have the first call of ``model`` compared over the ranks, before any other hook.

    Once: an engine may be built around a model that ``parallelize`` has sharded.
    """
    if any(isinstance(hook, FirstCall) for hook in model._forward_pre_hooks.values()):
        return
    model.register_forward_pre_hook(FirstCall(group), prepend=True, with_kwargs=True)


@torch.no_grad()
def check_replicas(model: nn.Module) -> None:
    """Compare what several tensor-parallel ranks hold of every parameter, bit by bit.

    That is every whole parameter, and the key/value heads that ranks share. Every rank of the
    group calls it, with ZeRO 3 every rank of the run. RuntimeError on each of them, naming the
    parameters that drifted apart.
    """
    state = tensor_parallel(model)
    agreement = Agreement(state.group.handle)
    mine: dict[tuple[str, int, int], str] = {}  # by name, owner and number of the run
    for entry, parameter in zip(state.plan.entries, state.parameters, strict=True):
        shared = entry.shared(state.group.rank)
        if entry.is_tied or (entry.is_sharded and not shared):
            continue
        with interop.gathered([parameter]):
            held = parameter.detach()
            if not entry.is_sharded:
                mine[entry.name, 0, 0] = _hash(held)
            for number, (offset, length, owner, _) in enumerate(shared):
                mine[entry.name, owner, number] = _hash(held.narrow(entry.dim, offset, length))
    found: dict[tuple[str, int, int], set[str]] = {}
    for theirs in agreement.exchange(mine):
        for key, digest in theirs.items():
            found.setdefault(key, set()).add(digest)
    drifted = list(dict.fromkeys(name for (name, *_), seen in found.items() if len(seen) > 1))
    if drifted:
        named = ", ".join(drifted[:_NAMED]) + (", ..." if len(drifted) > _NAMED else "")
        raise RuntimeError(
            f"{len(drifted)} parameter{'s' if len(drifted) > 1 else ''} that several ranks hold "
            f"differ between the tensor-parallel ranks {list(state.group.global_ranks)}: {named}"
        )


def _hash(tensor: Tensor) -> str:
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=_DIGEST).hexdigest()
