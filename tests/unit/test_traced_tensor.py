# SPDX-License-Identifier: Apache-2.0
"""What is done to tensors without values gives, read a slice at a time, what it gives with them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from deepspeed_autotp.loading.read_plan import ReadPlan
from deepspeed_autotp.loading.safetensors_header import stored_tensors
from deepspeed_autotp.loading.slices import Box, slices
from deepspeed_autotp.loading.traced_tensor import Computed, TracedTensor, traced
from deepspeed_autotp.native.file_reads import OpenFiles

Made = Callable[[Tensor, Tensor], Tensor]


def with_item(a: Tensor, b: Tensor) -> Tensor:
    made = a.clone()
    made[1] = 7.0
    return made


def with_data(a: Tensor, b: Tensor) -> Tensor:
    made = nn.Parameter(a.detach())
    made.data = F.pad(made.data, (0, 0, 0, 0))
    return made.detach()


KEPT_APART: dict[str, Made] = {
    "itself": lambda a, b: a,
    "cast": lambda a, b: a.to(torch.bfloat16),
    "cast twice": lambda a, b: a.to(torch.bfloat16).to(torch.float32),
    "stacked": lambda a, b: torch.stack([a, b, a], dim=1),
    "concatenated": lambda a, b: torch.cat([a, b], dim=-1),
    "stacked and concatenated": lambda a, b: torch.cat(
        [torch.stack([a, b]), torch.stack([b, a])], dim=1
    ),
    "chunked": lambda a, b: torch.chunk(a, 2, dim=0)[1].contiguous(),
    "split": lambda a, b: torch.split(a, [1, 5], dim=1)[1],
    "swapped": lambda a, b: torch.transpose(a, dim0=0, dim1=1).contiguous(),
    "swapped, cast and chunked": lambda a, b: a.to(torch.float64).transpose(0, 1).chunk(3)[2],
}
IN_FULL: dict[str, Made] = {
    "reshaped": lambda a, b: a.view(2, 2, 6).transpose(0, 1).reshape(4, 6),
    "summed": lambda a, b: a * 2 + b,
    "of both": lambda a, b: torch.cat([a.double(), b], dim=0),
    "an element set": with_item,
    "other data": with_data,
}


def read(made: Tensor, box: Box) -> Tensor:
    assert isinstance(made, TracedTensor)
    shape = [length for _, length in box]
    out = torch.empty(shape, dtype=made.dtype)
    stands_for = torch.empty(shape, dtype=made.dtype, device="meta")
    pieces = [(piece, out) for piece in slices(made.origin, box, stands_for)]
    with OpenFiles() as files:
        ReadPlan(pieces).run(files, lambda _: None)
    return out


@pytest.fixture
def pair(tmp_path: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Two tensors of [4, 6] with their values, and without."""
    values = torch.randn(2, 4, 6).unbind()
    save_file({"a": values[0].clone(), "b": values[1].clone()}, tmp_path / "x.safetensors")
    stored = stored_tensors(tmp_path / "x.safetensors")
    return list(values), [traced(stored[name]) for name in "ab"]


@pytest.mark.parametrize("name", [*KEPT_APART, *IN_FULL])
def test_every_slice_has_the_values_of_the_full_tensor(
    pair: tuple[list[Tensor], list[Tensor]], name: str
) -> None:
    make = (KEPT_APART | IN_FULL)[name]
    expected, made = make(*pair[0]), make(*pair[1])
    assert made.is_meta and made.shape == expected.shape and made.dtype == expected.dtype
    assert isinstance(made, TracedTensor)
    assert isinstance(made.origin, Computed) == (name in IN_FULL)
    for dim, size in enumerate(expected.shape):
        for start in range(size):
            for end in range(start + 1, size + 1):
                box = [(0, each) for each in expected.shape]
                box[dim] = (start, end - start)
                found = read(made, tuple(box))
                assert torch.equal(found, expected.narrow(dim, start, end - start))


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: a.normal_(),
        lambda a, b: a.chunk(2)[0].zero_(),
        lambda a, b: a[1].fill_(0),
        lambda a, b: a.add_(b),
        lambda a, b: a.__iadd__(1),
        lambda a, b: a.chunk(2)[0].__setitem__(0, 1.0),
        lambda a, b: setattr(a, "data", torch.ones(4, 6)),
    ],
)
def test_what_would_lose_a_change_is_refused(
    pair: tuple[list[Tensor], list[Tensor]], change: Callable[[Tensor, Tensor], object]
) -> None:
    with pytest.raises((NotImplementedError, RuntimeError, TypeError)):
        change(*pair[1])


def test_tensors_like_one_of_a_file_have_values(pair: tuple[list[Tensor], list[Tensor]]) -> None:
    a = pair[1][0]
    torch.manual_seed(3)
    found = torch.rand_like(a)
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(4, 6)) and type(found) is Tensor
    assert torch.equal(torch.zeros_like(a), torch.zeros(4, 6))
