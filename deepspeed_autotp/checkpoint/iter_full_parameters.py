# SPDX-License-Identifier: Apache-2.0
"""The full parameters of a model one after the other, as for an inference engine that is given new
weights while training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor, nn

from deepspeed_autotp._core import Entry
from deepspeed_autotp.checkpoint.expert_weights import refuse_experts
from deepspeed_autotp.config.validation import wrong
from deepspeed_autotp.interop.deepspeed.parameters import full_shape, gathered_parameters
from deepspeed_autotp.interop.fully_shard import fully_sharded_modules
from deepspeed_autotp.interop.wrappers import without_wrappers
from deepspeed_autotp.state.fully_shard import settle_parameters
from deepspeed_autotp.state.sharded_model import (
    TensorParallel,
    find_nested_tensor_parallel,
    refuse_sharded_4bit,
    unsharded,
    unwrapped_model,
)

__all__ = ["iter_full_parameters"]

Named = tuple[str, Tensor]


def iter_full_parameters(
    engine_or_model: nn.Module, *, bucket_bytes: int = 256 << 20
) -> Iterator[tuple[str, Tensor]]:
    """Name and full tensor of every parameter, on the device of the model, on every rank.

    The names are those of the unsharded model; tied parameters come once, buffers not at all. The
    shards of up to ``bucket_bytes`` of full tensors are gathered by one collective. All ranks of
    the run iterate to the end, also those that do nothing with the tensors. A tensor is a copy, or
    of a replicated parameter the values themselves, and may be kept until the next step; under
    ZeRO 3 until the next one is asked for. ValueError for ``bucket_bytes`` below 1, for a model
    with ``fully_shard`` or shards in 4 bits, for a part of a sharded model, for a parameter that
    was replaced, and within ``gather_params``.
    """
    if type(bucket_bytes) is not int or bucket_bytes < 1:
        raise ValueError(
            f"iter_full_parameters: bucket_bytes: {wrong(bucket_bytes, 'an integer above 0')}"
        )
    state = find_nested_tensor_parallel(engine_or_model)
    model = unwrapped_model(engine_or_model)
    if fully_sharded_modules(model):
        raise ValueError(
            "iter_full_parameters: got a model with fully_shard, which keeps its parameters in "
            "parts on data-parallel ranks; read it with full_state_dict"
        )
    refuse_sharded_4bit("iter_full_parameters", model.parameters())
    refuse_experts("iter_full_parameters", state, model)
    return _full(model, state, bucket_bytes)


def _full(
    model: nn.Module, state: TensorParallel | None, bucket_bytes: int
) -> Iterator[tuple[str, Tensor]]:
    settle_parameters(model, state)
    if state is not None and state.is_gathered:
        raise ValueError("iter_full_parameters: called within gather_params; leave it first")
    for bucket in _buckets(model.named_parameters(), state, bucket_bytes):
        with gathered_parameters([parameter for _, parameter in bucket]):
            values = [parameter.detach() for _, parameter in bucket]
            full = values if state is None else _gathered(bucket, state)
            for (name, _), each in zip(bucket, full, strict=True):
                yield without_wrappers(name), each


def _buckets(
    parameters: Iterable[Named], state: TensorParallel | None, most: int
) -> Iterator[list[Named]]:
    """Parameters in their order, together at most ``most`` bytes or one of them."""
    bucket: list[Named] = []
    held = 0
    for name, parameter in parameters:
        entry = None if state is None else state.entry(parameter)
        shape = full_shape(parameter) if entry is None else entry.shape
        nbytes = prod(shape) * parameter.element_size()
        if bucket and held + nbytes > most:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, parameter))
        held += nbytes
    if bucket:
        yield bucket


def _gathered(bucket: Sequence[Named], state: TensorParallel) -> list[Tensor]:
    """The full tensors of a bucket, with one collective for each dtype."""
    full = [parameter.detach() for _, parameter in bucket]
    sharded: dict[torch.dtype, list[tuple[int, Entry]]] = {}
    for index, (_, parameter) in enumerate(bucket):
        entry = state.entry(parameter)
        if entry is not None and entry.is_sharded:
            sharded.setdefault(parameter.dtype, []).append((index, entry))
    for found in sharded.values():
        shards = [full[index] for index, _ in found]
        for (index, entry), pieces in zip(found, _all_gathered(shards, found, state), strict=True):
            full[index] = unsharded(pieces, entry)
    return full


def _all_gathered(
    shards: Sequence[Tensor], found: Sequence[tuple[int, Entry]], state: TensorParallel
) -> Iterator[list[Tensor]]:
    """For each shard those of all ranks, in rank order."""
    shapes = [[entry.local_shape(rank) for _, entry in found] for rank in range(state.group.size)]
    flat = torch.cat([shard.reshape(-1) for shard in shards])
    gathered = state.group.all_gather(flat, [(sum(map(prod, of_rank)),) for of_rank in shapes])
    split = [
        [
            piece.view(shape)
            for piece, shape in zip(all_of.split(list(map(prod, of_rank))), of_rank, strict=True)
        ]
        for all_of, of_rank in zip(gathered, shapes, strict=True)
    ]
    for index in range(len(found)):
        yield [of_rank[index] for of_rank in split]
