# SPDX-License-Identifier: Apache-2.0
"""The chunks of a shard are where its elements are in the full tensor; a copy has its own."""

import copy
import pickle
from collections.abc import Sequence

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager, StagingOptions

from deepspeed_autotp._core import Entry, Model, Plan, Rules
from deepspeed_autotp.checkpoint.shard_tensor import ShardTensor, placed
from deepspeed_autotp.state.sharded_model import shard_of
from tests.support.core_llama import ROOT_MODULE, llama, preset


def viewed(shape: list[int], dim: int, size: tuple[int, int]) -> Plan:
    """One weight of ``size``, sharded over two ranks along ``dim`` of ``shape``."""
    modules = [ROOT_MODULE, ("w", "Linear", "linear", {})]
    rules = Rules()
    rules.add(["w"], {"partition_type": "column", "shape": shape, "partition_dim": dim}, label="r")
    return Plan(Model(modules, [("w.weight", "weight", 1, size, "float32", 4, -1)]), rules, ranks=2)


PLANS = [
    *(Plan(llama(key_heads=keys), preset(), ranks=n) for keys in (1, 2, 4) for n in (1, 2, 3, 4)),
    viewed([2, 12, -1], 1, (24, 5)),  # blocks of the sharded dimension within a dimension
    viewed([8, 3, -1], 0, (24, 5)),  # each element of it is three
]


def sharded(plan: Plan) -> list[Entry]:
    return [entry for entry in plan.entries if entry.is_sharded]


def where(chunk: ChunkStorageMetadata) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))


def places(chunks: Sequence[tuple[int, int, int, bool]]) -> dict[int, int]:
    """Where each element of the shard is in the full tensor."""
    return {start + i: at + i for start, at, length, _ in chunks for i in range(length)}


def numbered(entry: Entry) -> torch.Tensor:
    return torch.arange(torch.Size(entry.shape).numel()).reshape(entry.shape)


@pytest.mark.parametrize("plan", PLANS)
def test_chunks_are_where_the_shard_is_in_the_full_tensor(plan: Plan) -> None:
    for entry in sharded(plan):
        full, written = numbered(entry), torch.zeros(entry.shape, dtype=torch.int)
        for rank in range(plan.ranks):
            shard = shard_of(full, entry=entry, rank=rank)
            made = placed(shard, entry, rank)
            assert made.shape == entry.shape
            read = 0
            for chunk in made.__create_chunk_list__():
                part = made.__get_tensor_shard__(MetadataIndex("w", chunk.offsets))
                assert torch.equal(part, full[where(chunk)])
                assert part.untyped_storage().data_ptr() == shard.untyped_storage().data_ptr()
                read += part.numel()
            assert read == shard.numel()
            for item in made.__create_write_items__("w", made):
                assert item.tensor_data is not None
                written[where(item.tensor_data.chunk)] += 1
        assert torch.equal(written, torch.ones_like(written)), "each element is written once"


@pytest.mark.parametrize("plan", PLANS)
def test_chunks_of_parts_of_a_shard_are_those_of_the_shard(plan: Plan) -> None:
    for entry in sharded(plan):
        width = entry.local_shape(0)[entry.dim]
        parts = [*entry.chunks(0, 0, width // 3), *entry.chunks(0, width // 3, width)]
        assert places(parts) == places(entry.chunks(0, 0, width))
        assert len(places(parts)) == width
        assert entry.chunks(0, 1, 1) == ()
        with pytest.raises(ValueError, match=f"expected bounds in 0 to {width}"):
            entry.chunks(0, 0, width + 1)


def test_a_replicated_parameter_has_no_chunks() -> None:
    skipped = Rules()
    skipped.add([".*"], {"partition_type": "skip"}, label="r")
    entry = Plan(llama(), skipped, ranks=2).entries[0]
    with pytest.raises(ValueError, match="is replicated, expected a sharded parameter"):
        entry.chunks(0, 0, 1)


def test_staging_copies_the_shard_and_nothing_computes_with_it() -> None:
    plan = Plan(llama(), preset(), ranks=3)
    entry = next(entry for entry in plan.entries if entry.is_sharded)
    made = placed(torch.ones(entry.local_shape(1)), entry, 1)
    stagers = [DefaultStager(StagingOptions(False, False, False, False)), BlockingAsyncStager()]
    copies = [
        made.clone(),
        copy.deepcopy(made),
        *(each.stage({"w": made})["w"] for each in stagers),
    ]
    copies.append(pickle.loads(pickle.dumps(made)))
    made.shard.zero_()
    for each in copies:
        assert isinstance(each, ShardTensor)
        assert (each.shape, each.chunks) == (made.shape, made.chunks)
        assert bool((each.shard == 1).all())
    with pytest.raises(NotImplementedError, match="compute with the parameters of the model"):
        made.sum()
    assert repr(made) == f"ShardTensor({list(entry.shape)}, torch.float32; 1 chunks here)"
