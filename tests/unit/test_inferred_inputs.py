# SPDX-License-Identifier: Apache-2.0
"""Inputs of a model that no library knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepspeed_autotp.self_check.inferred_inputs import TrainingData, inferred_inputs

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 4), nn.Embedding(64, 4)


class Labels(Model):
    def forward(self, tokens: Tensor, mask: Tensor | None = None, targets: Any = None) -> None: ...


class OneLetter(Model):
    def forward(self, idx, y=None, scale=1.0, **more):  # type: ignore[no-untyped-def]
        ...


class Quoted(Model):
    def forward(self, ids: torch.LongTensor, label_ids: torch.LongTensor, *rest: int) -> None: ...


class NeedsNumber(Model):
    def forward(self, ids: Tensor, length: int) -> None: ...


class NeedsNothing(Model):
    def forward(self, flag: bool = False) -> None: ...


class NoEmbedding(nn.Module):
    def forward(self, x: Tensor) -> None: ...


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Labels(), ["tokens", "targets"]),
        (OneLetter(), ["idx", "y"]),
        (Quoted(), ["ids", "label_ids"]),
    ],
)
def test_ids_are_given_for_what_is_needed_and_for_labels(
    model: nn.Module, names: list[str]
) -> None:
    found = inferred_inputs(model, device=CPU)
    assert found is not None and list(found) == names
    for value in found.values():
        assert isinstance(value, Tensor) and value.dtype == torch.int64
        assert value.shape == (2, 8) and 0 <= int(value.min()) <= int(value.max()) < 11


def test_they_are_the_same_each_time_and_leave_the_rng_state_alone() -> None:
    model = Labels()
    state = torch.get_rng_state()
    first, second = (inferred_inputs(model, device=CPU) for _ in range(2))
    assert first is not None and second is not None
    assert torch.equal(first["tokens"], second["tokens"])  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "model", [NeedsNumber(), NeedsNothing(), NoEmbedding(), nn.Embedding(4, 4)]
)
def test_nothing_is_inferred_where_an_argument_is_something_else(model: nn.Module) -> None:
    found = inferred_inputs(model, device=CPU)
    assert found is None or list(found) == ["input"]


@pytest.mark.parametrize(
    ("samples", "names"),
    [
        ([{"tokens": torch.ones(3), "targets": torch.ones(3)}] * 3, ["tokens", "targets"]),
        ([(torch.ones(3), torch.ones(3))] * 2, ["tokens", "mask"]),
        (torch.ones(4, 3), ["tokens"]),
    ],
)
def test_the_first_batch_is_given_by_keys_or_in_order(samples: Any, names: list[str]) -> None:
    found = TrainingData(samples, None).inputs(Labels(), device=CPU)
    assert found is not None and list(found) == names
    assert all(isinstance(v, Tensor) and v.shape == (2, 3) for v in found.values())


@pytest.mark.parametrize(
    ("samples", "collate"),
    [
        (iter([1, 2]), None),
        ([torch.ones(2)], None),
        ([(torch.ones(1),) * 9] * 2, None),
        (["a", "b"], "".join),
    ],
)
def test_no_batch_is_taken_of_what_has_no_indices_or_does_not_fit(
    samples: Any, collate: Any
) -> None:
    assert TrainingData(samples, collate).inputs(Labels(), device=CPU) is None
