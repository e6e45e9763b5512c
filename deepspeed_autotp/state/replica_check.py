# SPDX-License-Identifier: Apache-2.0
"""Checks that all ranks of a TP group have equal replicated parameters, batches and RNG states.

A dropout mask over replicated activations must be the same, or the activations diverge.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from deepspeed_autotp._core import Entry
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.deepspeed.parameters import gathered_parameters
from deepspeed_autotp.interop.fully_shard import gathered
from deepspeed_autotp.interop.torch_private import hooked_once
from deepspeed_autotp.state.fully_shard import follow_fully_shard
from deepspeed_autotp.state.sharded_model import TensorParallel, tensor_parallel

_log = logging.getLogger("deepspeed_autotp")

# Bytes of a hash that the ranks compare.
_DIGEST = 16
# Elements of a tensor of a later call that are hashed, of which there may be many more in a mask.
_SAMPLED = 1 << 16
# How many names a message lists.
_NAMED = 5

# Name of the parameter, owner and index of a run that several ranks hold.
RunKey = tuple[str, int, int]


def broadcast_rng_state(group: TPGroup, *, device: torch.device) -> None:
    """Give every rank the RNG state of TP rank 0, of the CPU and of ``device``.

    ``device`` is where training will be, also while the model is on the CPU.
    """
    state = torch.get_rng_state()
    group.broadcast(state)
    torch.set_rng_state(state)
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        group.broadcast(state)
        torch.cuda.set_rng_state(state, device)


class CallCheck:
    """A forward pre-hook: in its first call the ranks compare their batches and RNG states.

    ValueError on every rank, before the call, when they are given different tensors: sums over
    the ranks would mix activations of different batches. RNG states that differ, as after
    ``manual_seed(rank)``, are replaced by that of TP rank 0, or the dropout of replicated
    activations would differ.

    On a CPU they compare the batches of later calls, too, but for floating-point tensors within
    others, and how many calls there were: a rank that has left out a call, or made it twice, would
    be in another one than those that it sums with. In shared memory each collective says which call
    it is of. Reading a batch would make a CPU wait for its GPU.
    """

    def __init__(self, group: TPGroup) -> None:
        self._group = group
        self._calls = 0

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        if torch.compiler.is_compiling():  # the comparison would break the graph
            return
        self._calls += 1
        device = next(module.parameters()).device
        if self._calls > 1 and device.type != "cpu":
            return
        digest = hashlib.blake2b(digest_size=_DIGEST)
        for name, value in (*enumerate(args), *sorted(kwargs.items())):
            for each in _tensors(value):
                if self._calls > 1 and each is not value and each.is_floating_point():
                    continue  # of a cache, in which each rank has its own heads
                values = each if self._calls == 1 else _sampled(each)
                digest.update(f"{name} {list(each.shape)} {each.dtype} {_hash(values)};".encode())
        batch = digest.digest()
        if self._calls == 1:
            self._compare_first(module, batch, device)
        is_labelled = self._group.set_call(self._calls, int.from_bytes(batch[:7]))
        if self._calls > 1 and not is_labelled:
            self._compare(module, batch)

    def _compare_first(self, module: nn.Module, batch: bytes, device: torch.device) -> None:
        group = self._group
        gathered = self._gathered(batch + _rng_digest(device))
        batches, states = (gathered == gathered[0]).split(_DIGEST, dim=1)
        if not batches.all():
            raise ValueError(
                f"the ranks {list(group.global_ranks)} are in one TP group of "
                f"{type(module).__name__} but got different first batches, expected the same "
                "batch; shard the data by the data-parallel rank, dist.get_rank() // "
                f"{group.size}, not by the global rank"
            )
        if not states.all():
            broadcast_rng_state(group, device=device)
            if group.rank == 0:
                _log.warning(
                    "the ranks %s are in one TP group of %s but have different RNG states; using "
                    "that of rank %d on all of them. Seed by the data-parallel rank, "
                    "dist.get_rank() // %d, not by the global rank",
                    list(group.global_ranks),
                    type(module).__name__,
                    group.global_ranks[0],
                    group.size,
                )

    def _compare(self, module: nn.Module, batch: bytes) -> None:
        gathered = self._gathered(self._calls.to_bytes(8) + batch)
        if not (gathered == gathered[0]).all():
            raise ValueError(
                f"the ranks {list(self._group.global_ranks)} are in one TP group of "
                f"{type(module).__name__} but are at different calls of it, expected the same call "
                f"with the same batch: this rank is at call {self._calls}; leave out a batch, a "
                "forward or a backward on all of them or on none"
            )

    def _gathered(self, data: bytes) -> Tensor:
        """The ``data`` of every rank, in rank order."""
        sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return torch.stack(self._group.all_gather(sent, [sent.shape] * self._group.size))


def _sampled(tensor: Tensor) -> Tensor:
    """Some elements of a large tensor."""
    step = tensor.numel() // _SAMPLED
    return tensor if step <= 1 else tensor.detach().reshape(-1)[::step]


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors among what a forward is given; functions and modules are not compared."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _rng_digest(device: torch.device) -> bytes:
    digest = hashlib.blake2b(bytes(torch.get_rng_state().numpy()), digest_size=_DIGEST)
    if device.type == "cuda":
        digest.update(bytes(torch.cuda.get_rng_state(device).numpy()))
    return digest.digest()


def check_calls(state: TensorParallel) -> None:
    """Register the check of the calls of a sharded model, before any other hook."""
    state.hook(hooked_once(CallCheck(state.group), prepend=True, with_kwargs=True))


@torch.no_grad()
def check_replicas(model: nn.Module) -> None:
    """Compare, bit by bit, what several ranks of the TP group hold of every parameter.

    That is every replicated parameter, and the key/value heads that several ranks hold. Every
    rank of the group calls it, with ZeRO 3 and fully_shard every rank of the run. RuntimeError on
    each of them, naming the parameters that differ.
    """
    state = tensor_parallel(model)
    follow_fully_shard(model, state)
    agreement = Agreement(state.group.cpu_handle)
    rank = state.group.rank
    local: dict[RunKey, str] = {}
    for entry, parameter in zip(state.plan.entries, state.parameters, strict=True):
        if entry.is_tied or (entry.is_sharded and not entry.shared(rank)):
            continue
        with gathered_parameters([parameter]):
            for key, run in runs_of_several(entry, rank, gathered(parameter.detach())):
                local[key] = _hash(run)
    found: dict[RunKey, set[str]] = {}
    for digests in agreement.exchange(local):
        for key, digest in digests.items():
            found.setdefault(key, set()).add(digest)
    differing = [key for key, seen in found.items() if len(seen) > 1]
    if differing:
        what, names = described(differing)
        raise RuntimeError(
            f"{what} between the ranks {list(state.group.global_ranks)} of the TP group: {names}; "
            "update what several ranks hold in the same way on each of them"
        )


def runs_of_several(entry: Entry, rank: int, values: Tensor) -> Iterator[tuple[RunKey, Tensor]]:
    """The runs in ``values``, a rank's shard or a replicated parameter, that other ranks hold."""
    if not entry.is_sharded:
        yield (entry.name, 0, 0), values
        return
    for index, (offset, length, owner, _) in enumerate(entry.shared(rank)):
        yield (entry.name, owner, index), values.narrow(entry.dim, offset, length)


def described(differing: Iterable[RunKey]) -> tuple[str, str]:
    """How many parameters differ, in words, and the names of some of them."""
    names = list(dict.fromkeys(name for name, *_ in differing))
    is_one = len(names) == 1
    return (
        f"{len(names)} parameter{'' if is_one else 's'} that several ranks hold "
        f"differ{'s' if is_one else ''}",
        ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else ""),
    )


def _hash(tensor: Tensor) -> str:
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=_DIGEST).hexdigest()
