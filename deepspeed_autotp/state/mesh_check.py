# SPDX-License-Identifier: Apache-2.0
"""What spreads a sharded model over other ranks: never over several ranks of one TP group.

These have different shards, which data parallelism would take for replicas of one tensor: it would
give all of them the shards of one rank, and average their gradients.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp.interop.fully_shard import fully_sharded_modules, local_part
from deepspeed_autotp.interop.torch_private import active_ddp, forward_pre_hooks, is_managed_by_fsdp
from deepspeed_autotp.interop.wrappers import all_named_parameters
from deepspeed_autotp.state.sharded_model import TensorParallel, find_tensor_parallel

# Elements of a shard, and bytes of their hash, that the ranks compare.
_SAMPLE = 64
_DIGEST = 8

# A graph can name what it calls by a number alone.
_NUMBERS = itertools.count()
_CHECKS: weakref.WeakValueDictionary[int, _SpreadCheck] = weakref.WeakValueDictionary()


class _SpreadCheck:
    """A forward pre-hook of the sharded model, which looks at what is around and within it: in the
    first call, and once DistributedDataParallel or fully_shard has come since.

    ValueError on every rank of the TP group where its ranks are spread over as replicas, or all
    have the same shards.
    """

    def __init__(self, state: TensorParallel) -> None:
        self._state = weakref.ref(state)
        self._seen: set[int] = set()
        self.number = next(_NUMBERS)
        _CHECKS[self.number] = self

    def check_ddp(self) -> None:
        """ValueError where DistributedDataParallel is around the model, over TP ranks."""
        ddp, state = active_ddp(), self._state()
        if ddp is not None and state is not None:
            _check_ddp(ddp, state)

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        if torch.compiler.is_compiling():
            # Its module imports torch's compiler, which takes long.
            from deepspeed_autotp.native.constant_result import constant_result

            constant_result(_check_while_traced, self.number)
            return
        ddp = active_ddp()
        news = {0 if ddp is None else id(ddp), id(module) if is_managed_by_fsdp(module) else 0}
        if news <= self._seen:
            return
        self._seen |= news
        state = find_tensor_parallel(module)  # a copy of the model has another one
        if state is None:
            return
        if ddp is not None:
            _check_ddp(ddp, state)
        _check_fsdp(module)
        _refuse_same_shards(module, state)


def _check_while_traced(number: int) -> bool:
    """As ``check_ddp``, by number, while torch.compile makes a graph."""
    check = _CHECKS.get(number)
    if check is not None:
        check.check_ddp()
    return True


def _check_ddp(ddp: nn.Module, state: TensorParallel) -> None:
    handle: dist.ProcessGroup = ddp.process_group  # type: ignore[assignment]
    shared = sorted(set(dist.get_process_group_ranks(handle)) & set(state.group.global_ranks))
    if len(shared) > 1:
        raise ValueError(
            f"DistributedDataParallel: process_group: got one with the ranks {shared}, which have "
            "different shards in one TP group, and now have those of one rank; expected a group of "
            "data-parallel ranks: make one mesh, init_device_mesh(device, (dp, tp), "
            'mesh_dim_names=("dp", "tp")), pass mesh["tp"] to parallelize and '
            'process_group=mesh.get_group("dp") to DistributedDataParallel'
        )


def _check_fsdp(module: nn.Module) -> None:
    """ValueError where others than fully_shard of the model, or of modules in it, replace its
    parameters: gradients of these would not be summed over the TP ranks."""
    if is_managed_by_fsdp(module) and not fully_sharded_modules(module):
        raise ValueError(
            f"{type(module).__name__} is within a FullyShardedDataParallel (FSDP1), or a module "
            "that fully_shard was called for, which has its parameters; expected fully_shard "
            "(FSDP2) of the sharded model itself, or of modules in it, over data-parallel ranks"
        )


@torch.no_grad()
def _refuse_same_shards(module: nn.Module, state: TensorParallel) -> None:
    """ValueError where every shard is the same on all ranks of the TP group, as after a broadcast
    of one rank's shards to all. Tensors of one value are not compared."""
    named = list(_sampled(module, state))
    if not named:
        return
    sent = torch.frombuffer(bytearray(b"".join(digest for _, digest in named)), dtype=torch.uint8)
    found = torch.stack(state.group.all_gather(sent, [sent.shape] * state.group.size))
    digests = found.view(state.group.size, len(named), _DIGEST)
    compared = digests.ne(0).any(2).all(0)
    if compared.any() and (digests == digests[0])[:, compared].all():
        first = named[int(compared.int().argmax())][0]
        raise ValueError(
            f"the ranks {list(state.group.global_ranks)} of the TP group of "
            f"{type(module).__name__} have the same shards of {first} and all other weights "
            "that are sharded, as after a broadcast from one rank to all; broadcast "
            "over data-parallel ranks alone, load full weights by load_state_dict of the sharded "
            "model, and give Accelerate's FullyShardedDataParallelPlugin "
            "cpu_ram_efficient_loading=False"
        )


def _sampled(module: nn.Module, state: TensorParallel) -> Iterator[tuple[str, bytes]]:
    """The names of which the ranks have different shards of equal shape, and a hash of the first
    values that are here."""
    named = dict(all_named_parameters(state.root_in(module)))
    ranks = range(state.group.size)
    for entry in state.plan.entries:
        if entry.is_tied or not entry.is_sharded or any(map(entry.shared, ranks)):
            continue
        if len({entry.local_shape(rank) for rank in ranks}) == 1 and entry.name in named:
            # fully_shard may have unsharded it for this call: not on one rank alone.
            yield entry.name, _hash(local_part(named[entry.name].detach()))


def _hash(values: Tensor) -> bytes:
    """Zeros where all values are one."""
    sample = values.flatten()[:_SAMPLE].to("cpu", copy=True)  # fully_shard resizes that memory
    if sample.numel() == 0 or bool((sample == sample[0]).all()):
        return bytes(_DIGEST)
    data = sample.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def check_spreading(state: TensorParallel) -> None:
    """Check what spreads a sharded model from now on."""
    check = _SpreadCheck(state)

    def register(model: nn.Module) -> None:
        if check not in forward_pre_hooks(model):
            model.register_forward_pre_hook(check)

    state.hook(register)
