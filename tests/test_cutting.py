# SPDX-License-Identifier: Apache-2.0
"""Parameters become their shards, together or one by one, and with no memory to spare."""

import logging
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from deepspeed_autotp import cutting, native, ops


@dataclass
class Rows:
    """An entry of a plan that cuts the rows of an [8, 3] weight over two ranks."""

    name: str = "up.weight"
    view: tuple[int, int, int] = (1, 8, 3)
    dim: int = 0
    tied_to: int = -1
    taken: tuple[int, ...] = (4, 4)

    def runs(self, rank: int) -> tuple[int, ...]:
        return self.taken

    def local_shape(self, rank: int) -> tuple[int, ...]:
        return (4, 3)


def weights(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(8, 3)) for _ in range(count)]


def test_small_tensors_of_a_gpu_are_cut_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    pack_many = ops.pack_many

    def counted(fulls: list[torch.Tensor], cuts: list[ops.Cut]) -> list[torch.Tensor]:
        calls.append(len(fulls))
        return pack_many(fulls, cuts)

    monkeypatch.setattr(native, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(ops, "pack_many", counted)
    monkeypatch.setattr(cutting, "_TOGETHER", 3 * 96)
    parameters = weights(9)
    parameters.append(nn.Parameter(torch.randn(8, 3 << 15)))
    wholes = [parameter.detach().clone() for parameter in parameters]
    large = Rows(view=(1, 8, 3 << 15))
    large.local_shape = lambda rank: (4, 3 << 15)  # type: ignore[method-assign]
    entries = [Rows() for _ in range(9)] + [large]
    cutting.cut_parameters(zip(parameters, entries, strict=True), rank=1)  # type: ignore[arg-type]
    assert calls == [4, 4, 1, 1], "four pass the limit, the large one goes alone"
    for parameter, whole in zip(parameters, wholes, strict=True):
        assert torch.equal(parameter, whole[4:])


@pytest.mark.parametrize("taken", [(4, 4), (5, 2, 1, 2)], ids=["ascending", "in another order"])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_without_memory_a_shard_keeps_its_weights_memory(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Exception],
    taken: tuple[int, ...],
) -> None:
    def full(fulls: object, cuts: object) -> None:
        raise kind("tried to take 12 GiB")

    monkeypatch.setattr(ops, "pack_many", full)
    (parameter,) = weights(1)
    whole, place = parameter.detach().clone(), parameter.data_ptr()
    with caplog.at_level(logging.WARNING, logger="deepspeed_autotp"):
        cutting.cut_parameters([(parameter, Rows(taken=taken))], rank=1)  # type: ignore[list-item]
    pieces = [
        whole[start : start + length] for start, length in zip(taken[::2], taken[1::2], strict=True)
    ]
    assert torch.equal(parameter, torch.cat(pieces)) and parameter.data_ptr() == place
    assert "up.weight: no memory for the shard beside the whole weight (tried to" in caplog.text


def test_cut_and_whole_parameters_go_to_a_device() -> None:
    parameters = weights(3)
    wholes = [parameter.detach().clone() for parameter in parameters]
    entries = [Rows(), Rows(dim=-1), Rows(tied_to=0)]
    pairs = zip(parameters, entries, strict=True)
    cutting.move_parameters(pairs, rank=1, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert torch.equal(parameters[0], wholes[0][4:])
    assert torch.equal(parameters[1], wholes[1])
    assert torch.equal(parameters[2], wholes[2]), "its partner is cut, and is the same object"


def test_a_gpu_without_room_is_named_before_anything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def empty(size: int, **named: object) -> None:
        asked.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.\nMore")

    monkeypatch.setattr(torch, "empty", empty)
    cutting.check_room(7 << 30, None)
    cutting.check_room(7 << 30, torch.device("cpu"))
    assert asked == []
    expected = "part of the model, 7.5 GB, does not fit on cuda:1: CUDA out of memory. Tried to"
    with pytest.raises(ValueError, match=expected):
        cutting.check_room(7 << 30, torch.device("cuda", 1))
    assert asked == [7 << 30]
