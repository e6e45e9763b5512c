# SPDX-License-Identifier: Apache-2.0
"""A shard as torch.distributed.checkpoint (DCP) takes it: some chunks of a full tensor.

A chunk is a hyper-rectangle. A shard of fused q|k|v is several, with key/value heads that other
ranks hold, too, and fully_shard leaves this rank some rows of it: no DTensor says that. DCP asks a
tensor for its chunks by three methods, which DTensor has as well, and reads and writes them with
its own planners.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepspeed_autotp._core import Entry
from deepspeed_autotp.interop.fully_shard import local_part, local_window
from deepspeed_autotp.interop.torch_private import tensor_without_memory, with_leaves

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

# What staging does to a tensor, and what leaves its values where they are.
_ON_THE_SHARD = (
    *("aten::detach", "aten::alias", "aten::clone", "aten::_to_copy"),
    *("aten::zeros_like", "aten::empty_like"),
)
_NEW_EMPTY = "aten::new_empty"
_COPY = "aten::copy_"


@dataclass(frozen=True, slots=True)
class Chunk:
    """``sizes`` elements at ``offsets`` of the full tensor, which are at ``local`` of the shard.

    ``is_owned``: this TP rank is the lowest that holds them, and writes them.
    """

    offsets: tuple[int, ...]
    local: tuple[int, ...]
    sizes: tuple[int, ...]
    is_owned: bool


class ShardTensor(Tensor):
    """A tensor of the full shape, of which this rank has ``chunks`` in the memory of ``shard``.

    For torch.distributed.checkpoint alone: reading a checkpoint into it fills the shard in place.
    Its values take part in no computation.
    """

    shard: Tensor
    chunks: tuple[Chunk, ...]

    @staticmethod
    def of(shard: Tensor, *, shape: Sequence[int], chunks: tuple[Chunk, ...]) -> ShardTensor:
        made = tensor_without_memory(ShardTensor, shape, dtype=shard.dtype, device=shard.device)
        assert isinstance(made, ShardTensor)
        made.shard, made.chunks = shard, chunks
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardTensor({list(self.shape)}, {self.dtype}; {len(self.chunks)} chunks here)"

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        """What this rank writes: the chunks that it owns. DCP sees to data-parallel replicas."""
        # Who asks has imported them, which takes long.
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self.shard)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(chunk.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(_storage(chunk), properties, self.shape),
            )
            for chunk in self.chunks
            if chunk.is_owned
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """What this rank reads: all chunks."""
        return [_storage(chunk) for chunk in self.chunks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The memory of one chunk."""
        for chunk in self.chunks:
            if torch.Size(chunk.offsets) == index.offset:
                part = self.shard
                for dim, (start, size) in enumerate(zip(chunk.local, chunk.sizes, strict=True)):
                    part = part.narrow(dim, start, size)
                return part
        raise ValueError(f"{index.fqn}: this rank holds no chunk at {index.offset}")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, (made, *others) = func.name().partition(".")[0], args
        if isinstance(made, cls):
            if name in _ON_THE_SHARD:
                return cls._like(made, func(made.shard, *others, **(kwargs or {})))
            if name == _NEW_EMPTY and torch.Size(others[0]) == made.shape:
                return cls._like(made, func(made.shard, made.shard.shape, **(kwargs or {})))
            if name == _COPY and isinstance(others[0], cls) and others[0].chunks == made.chunks:
                made.shard.copy_(others[0].shard)
                return made
        raise NotImplementedError(
            f"{func} of a tensor of checkpoint_state, whose values are for "
            "torch.distributed.checkpoint; compute with the parameters of the model and the states "
            "of the optimizer"
        )

    @classmethod
    def _like(cls, made: ShardTensor, shard: Tensor) -> ShardTensor:
        return cls.of(shard, shape=made.shape, chunks=made.chunks)


def placed(tensor: Tensor, entry: Entry, rank: int) -> ShardTensor:
    """What the TP rank ``rank`` holds of ``entry`` in ``tensor``: its shard, or as a DTensor the
    part of it that fully_shard leaves here."""
    shard = local_part(tensor.detach())
    offsets, sizes = local_window(tensor)
    return ShardTensor.of(
        shard, shape=entry.shape, chunks=tuple(_chunks(entry, rank, offsets, sizes))
    )


def _chunks(
    entry: Entry, rank: int, offsets: Sequence[int], sizes: Sequence[int]
) -> Iterator[Chunk]:
    if 0 in sizes:
        return
    dim, begin = entry.dim, offsets[entry.dim]
    for start, at, length, is_owned in entry.chunks(rank, begin, begin + sizes[dim]):
        local = [0] * len(sizes)
        local[dim] = start - begin
        full, extent = list(offsets), list(sizes)
        full[dim], extent[dim] = at, length
        yield Chunk(tuple(full), tuple(local), tuple(extent), is_owned)


def _storage(chunk: Chunk) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))


class Given:
    """The tensors of a state that was given to DCP, which reads a checkpoint into them."""

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        self._tensors: list[Tensor] = []
        with_leaves(Tensor, self._tensors.append, state_dict)

    def check(self, state_dict: Mapping[str, Any]) -> None:
        """ValueError where ``state_dict`` has tensors of another origin, which are not read."""
        known = {id(tensor) for tensor in self._tensors}

        def check(tensor: Tensor) -> None:
            if id(tensor) not in known:
                raise ValueError(
                    "checkpoint_state: load_state_dict: got a tensor of shape "
                    f"{list(tensor.shape)} that state_dict did not give, expected what "
                    "torch.distributed.checkpoint.load has read in place; call that function"
                )

        with_leaves(Tensor, check, state_dict)
