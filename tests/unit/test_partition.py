# SPDX-License-Identifier: Apache-2.0
"""Parameters become their shards, together or one by one, and with no memory to spare."""

import logging
import resource
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from deepspeed_autotp.native import operators, packing
from deepspeed_autotp.sharding import partition
from deepspeed_autotp.sharding.pinned_copy import PinnedCopy


@dataclass
class Rows:
    """An entry of a plan that shards the rows of an [8, 3] weight over two ranks."""

    name: str = "up.weight"
    view: tuple[int, int, int] = (1, 8, 3)
    dim: int = 0
    tied_to: int = -1
    taken: tuple[int, ...] = (4, 4)

    @property
    def is_sharded(self) -> bool:
        return self.dim >= 0

    @property
    def is_tied(self) -> bool:
        return self.tied_to >= 0

    def runs(self, rank: int) -> tuple[int, ...]:
        return self.taken

    def local_shape(self, rank: int) -> tuple[int, ...]:
        return (4, 3)


def weights(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(8, 3)) for _ in range(count)]


def test_small_tensors_on_a_gpu_are_packed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    pack_many = packing.pack_many

    def counted(fulls: list[torch.Tensor], slices: list[packing.ShardSlice]) -> list[torch.Tensor]:
        calls.append(len(fulls))
        return pack_many(fulls, slices)

    monkeypatch.setattr(operators, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(packing, "pack_many", counted)
    monkeypatch.setattr(partition, "_TOGETHER", 3 * 96)
    parameters = weights(9)
    parameters.append(nn.Parameter(torch.randn(8, 3 << 15)))
    originals = [parameter.detach().clone() for parameter in parameters]
    large = Rows(view=(1, 8, 3 << 15))
    large.local_shape = lambda rank: (4, 3 << 15)  # type: ignore[method-assign]
    entries = [Rows() for _ in range(9)] + [large]
    partition.shard_parameters(zip(parameters, entries, strict=True), rank=1)  # type: ignore[arg-type]
    assert calls == [4, 4, 1, 1], "four pass the limit, the large one goes alone"
    for parameter, original in zip(parameters, originals, strict=True):
        assert torch.equal(parameter, original[4:])


@pytest.mark.parametrize("taken", [(4, 4), (5, 2, 1, 2)], ids=["ascending", "in another order"])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_without_memory_a_shard_keeps_its_weights_memory(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Exception],
    taken: tuple[int, ...],
) -> None:
    def full(fulls: object, slices: object) -> None:
        raise kind("tried to take 12 GiB")

    monkeypatch.setattr(packing, "pack_many", full)
    (parameter,) = weights(1)
    original, place = parameter.detach().clone(), parameter.data_ptr()
    with caplog.at_level(logging.WARNING, logger="deepspeed_autotp"):
        partition.shard_parameters([(parameter, Rows(taken=taken))], rank=1)  # type: ignore[list-item]
    pieces = [
        original[start : start + length]
        for start, length in zip(taken[::2], taken[1::2], strict=True)
    ]
    assert torch.equal(parameter, torch.cat(pieces)) and parameter.data_ptr() == place
    assert "up.weight: no memory for the shard beside the full weight (tried to" in caplog.text


def test_without_memory_neighbours_keep_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fulls: object, slices: object) -> None:
        raise torch.OutOfMemoryError("tried to take 12 GiB")

    monkeypatch.setattr(packing, "pack_many", full)
    fused = torch.randn(8, 6)
    before = fused.clone()
    parameter = nn.Parameter(fused[:, :3])
    partition.shard_parameters([(parameter, Rows())], rank=1)  # type: ignore[list-item]
    assert torch.equal(parameter, before[4:, :3])
    assert parameter.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    assert torch.equal(fused[:, 3:], before[:, 3:])


def test_what_is_not_about_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fulls: object, slices: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(packing, "pack_many", broken)
    (parameter,) = weights(1)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        partition.shard_parameters([(parameter, Rows())], rank=1)  # type: ignore[list-item]


def test_a_cpu_without_memory_is_recognized(caplog: pytest.LogCaptureFixture) -> None:
    """By torch's real message; the weight itself is never read or written."""
    size = 1 << 28
    large = Rows(view=(1, size, 1), taken=(0, size // 2))
    large.local_shape = lambda rank: (size // 2,)  # type: ignore[method-assign]
    parameter = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), limits[1]))
    try:
        partition.shard_parameters([(parameter, large)], rank=0)  # type: ignore[list-item]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert parameter.shape == (size // 2,) and "no memory for the shard" in caplog.text


def test_sharded_and_replicated_parameters_go_to_a_device() -> None:
    parameters = weights(3)
    originals = [parameter.detach().clone() for parameter in parameters]
    entries = [Rows(), Rows(dim=-1), Rows(tied_to=0)]
    pairs = zip(parameters, entries, strict=True)
    pinned = PinnedCopy(torch.device("cpu"), buffer=40)
    partition.move_parameters(pairs, rank=1, copy=pinned)  # type: ignore[arg-type]
    assert torch.equal(parameters[0], originals[0][4:])
    assert torch.equal(parameters[1], originals[1])
    assert torch.equal(parameters[2], originals[2]), (
        "its partner is sharded, and is the same object"
    )


def test_a_gpu_without_room_is_named_before_anything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def empty(size: int, **named: object) -> None:
        asked.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.\nMore")

    monkeypatch.setattr(torch, "empty", empty)
    partition.check_memory(7 << 30, 3, torch.device("cpu"))
    assert asked == []
    expected = "this rank's shards, 7.5 GB, do not fit on cuda:1; use a larger TP size or another"
    with pytest.raises(ValueError, match=expected):
        partition.check_memory(7 << 30, 3, torch.device("cuda", 1))
    assert asked == [(7 << 30) + 3 * 512 + (64 << 20)]
