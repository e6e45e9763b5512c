# SPDX-License-Identifier: Apache-2.0
"""The kernels themselves, run on a CPU in several orders of their blocks and threads; and that a
kernel with a fault is noticed. unit/test_cross_entropy_kernels.py tests the values."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.cross_entropy_kernels import TYPES, EmulatedKernels, arguments, batch, exact
from tests.support.emulated_cuda import (
    FEW,
    MANY,
    ORDERS,
    Args,
    Copy,
    Library,
    build,
    build_edited,
    death,
)

INVALID_VALUE, INVALID_CONFIGURATION = 1, 9


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def library(built: Path) -> Library:
    found = Library(built)
    found.order(0)
    return found


def part(memory: Tensor, at: int, rows: int, row_bytes: int, pitch: int) -> Tensor:
    return memory.as_strided((rows, row_bytes), (pitch, 1), at)


def copy_of(source: Tensor, target: Tensor, word: int, rows: int, row_bytes: int) -> Copy:
    """A copy between two parts of memories, as ``part`` gives them."""
    pitches = {"source_pitch": source.stride(0), "target_pitch": target.stride(0)}
    ends = {"source": source.data_ptr(), "target": target.data_ptr()}
    return Copy(**ends, **pitches, rows=rows, row_bytes=row_bytes, word=word)


def drawn_shapes(draw: random.Random, word: int) -> Iterable[tuple[int, int]]:
    """(rows, words of a row): around the sizes of tiles, and others."""
    tile = 1024 if word == 16 else 2048
    yield from ((1, 1), (1, tile), (1, tile + 1), (3, tile), (2, tile + 1), (tile + 1, 1))
    yield from ((draw.randint(1, 90), draw.randint(1, 90)) for _ in range(6))
    yield from ((draw.randint(1, 3), draw.randint(1, 3 * tile)) for _ in range(3))


def check_copies(library: Library, word: int) -> None:
    """Copies that share no byte, between memories of which all is compared."""
    draw = random.Random(word)
    source = torch.randint(0, 256, (3 << 20,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    expected, copies, at = target.clone(), [], 0
    for rows, words in drawn_shapes(draw, word):
        row_bytes = words * word
        pitches = [row_bytes + word * draw.randint(0, 3) for _ in range(2)]
        whence = word * draw.randint(0, (source.numel() - rows * pitches[0]) // word)
        at += word * draw.randint(1, 3)
        whole = part(source, whence, rows, row_bytes, pitches[0])
        copies.append(
            copy_of(whole, part(target, at, rows, row_bytes, pitches[1]), word, rows, row_bytes)
        )
        part(expected, at, rows, row_bytes, pitches[1]).copy_(whole)
        at += rows * pitches[1]
    assert at <= target.numel()
    assert library.copy(copies) == 0
    assert torch.equal(target, expected)


def check_moves(library: Library, word: int) -> None:
    """Moves to lower addresses by one word and more; the later ones read what others wrote."""
    memory = torch.randint(0, 256, (1 << 18,), dtype=torch.uint8)
    expected, copies = memory.clone(), []
    # Rows, their words, words from row to row, and by how many the first one moves.
    moves = [(1, 1, 1, 1), (1, 700, 700, 1), (1, 5000, 5000, 1), (1, 3000, 3000, 260)]
    for rows, words, pitch, apart in [*moves, (900, 3, 4, 1), (300, 9, 10, 0), (3, 2100, 2101, 5)]:
        row_bytes, first = words * word, 16 + apart * word
        source = part(memory, first, rows, row_bytes, pitch * word)
        target = part(memory, 16, rows, row_bytes, row_bytes)
        copies.append(copy_of(source, target, word, rows, row_bytes))
        read = part(expected, first, rows, row_bytes, pitch * word).clone()
        part(expected, 16, rows, row_bytes, row_bytes).copy_(read)
    assert library.copy(copies, in_order=True) == 0
    assert torch.equal(memory, expected)


def check_rows(library: Library, dtype: torch.dtype = torch.float32) -> Tensor:
    """The statistics of some rows, which are those of float64."""
    logits, columns = batch(4099, dtype, offset=3)
    total, _, _ = exact(logits, columns, 0.0)
    found = EmulatedKernels(library).statistics(logits, columns)
    sums, rows = found[0].double() + found[1].double().log(), total.isfinite()
    assert (sums - total)[rows].abs().max() <= 1e-6 * total[rows].abs().max()
    return found


def in_all_orders(library: Library, check: Callable[[], object]) -> None:
    for order in ORDERS:
        library.order(order)
        check()


@pytest.mark.parametrize("word", [1, 2, 4, 8, 16])
def test_copies_write_what_they_shall_and_no_more(library: Library, word: int) -> None:
    in_all_orders(library, lambda: check_copies(library, word))


@pytest.mark.parametrize("word", [1, 2, 4, 8, 16])
def test_moves_in_order_read_ahead_of_what_they_write(library: Library, word: int) -> None:
    in_all_orders(library, lambda: check_moves(library, word))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_gives_the_same_bits_in_every_order(library: Library, dtype: torch.dtype) -> None:
    expected = check_rows(library, dtype)

    def check() -> None:
        found = check_rows(library, dtype)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))

    in_all_orders(library, check)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(
    ("count", "launches"),
    [(0, 0), (1, 1), (FEW, 1), (FEW + 1, 1), (MANY, 1), (MANY + 1, 2), (3 * MANY - 1, 3)],
)
def test_a_list_takes_as_few_launches_as_it_fits_in(
    library: Library, count: int, launches: int, in_order: bool
) -> None:
    source = torch.randint(1, 256, (16 * count,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    ends = [
        (part(source, 16 * i, 1, 16, 16), part(target, 16 * i, 1, 16, 16)) for i in range(count)
    ]
    before = library.launches
    assert library.copy([copy_of(*both, 16, 1, 16) for both in ends], in_order=in_order) == 0
    assert library.launches - before == launches
    assert torch.equal(target, source)


def test_rows_of_no_width_and_no_rows_are_no_errors(library: Library) -> None:
    emulated, columns = EmulatedKernels(library), torch.tensor([0, -1])
    found = emulated.statistics(torch.empty(2, 0), columns)
    assert found.tolist() == [[-torch.inf] * 2, [0.0] * 2, [0.0] * 2]
    before = library.launches
    emulated.differentiate_(torch.empty(2, 0), torch.zeros(2), columns, torch.ones(2))
    emulated.differentiate_(torch.empty(0, 5), torch.zeros(0), columns[:0], torch.ones(0))
    assert emulated.statistics(torch.empty(0, 5), columns[:0]).shape == (3, 0)
    assert library.launches == before


def test_what_a_launch_does_not_take_is_an_error_and_starts_nothing(library: Library) -> None:
    before = library.launches
    for rows, kind, error in (
        (1 << 31, TYPES[torch.float32], INVALID_CONFIGURATION),
        (1, 9, INVALID_VALUE),
    ):
        args = Args(tokens=rows, width=1, type=kind)
        assert library.statistics(args) == library.gradient(args) == error
    row = torch.zeros(1, 4, dtype=torch.uint8)
    assert library.copy([copy_of(row, row, 1, 1 << 43, 4)]) == INVALID_CONFIGURATION
    assert library.launches == before


def test_an_error_of_a_launch_is_told_once(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = torch.zeros(1, 4, dtype=torch.uint8)
    logits, columns = batch(7, torch.float32)
    args = arguments(logits, columns, 0.0)
    monkeypatch.setenv("EMULATED_ERROR", "209")
    assert library.copy([copy_of(row, row, 1, 1, 4)]) == 209
    assert library.statistics(args) == library.gradient(args) == 209
    assert library.error_left == 0


FAULTS = [
    ("copy.cu", "__syncthreads(); /* all of", "(void)0; /* all of", "moves"),
    ("copy.cu", "__syncthreads(); /* this tile", "(void)0; /* this tile", "moves"),
    ("copy.cu", "words)\n            __stcs", "words - 1)\n            __stcs", "copies"),
    ("cross_entropy.cu", "    __syncthreads();\n", "", "rows"),
    ("cross_entropy.cu", "apart > 0", "apart > 1", "rows"),
]


@pytest.mark.parametrize(("file", "text", "instead", "checks"), FAULTS)
def test_a_fault_in_a_kernel_is_noticed_in_some_order(
    built: Path, tmp_path: Path, file: str, text: str, instead: str, checks: str
) -> None:
    faulty = Library(build_edited(tmp_path, built, file, text, instead))
    check: Callable[[], object] = {
        "copies": lambda: check_copies(faulty, 4),
        "moves": lambda: check_moves(faulty, 4),
        "rows": lambda: check_rows(faulty),
    }[checks]
    with pytest.raises(AssertionError):
        in_all_orders(faulty, check)


def test_a_word_at_an_address_that_it_does_not_divide_is_noticed(built: Path) -> None:
    copy = "Copy(source={}, target={}, rows=1, row_bytes=64, word={})"
    for off, word in ((8, 16), (4, 8), (2, 4), (1, 2)):
        loading = copy.format(f"start + {off}", "start + 256", word)
        storing = copy.format("start", f"start + 256 + {off}", word)
        assert "misaligned address" in death(f"library.copy([{loading}])", built)
        assert "misaligned address" in death(f"library.copy([{storing}])", built)


SUM = "    const tp::Sum sum =\n"
BARRED = "    if (thread == 3)\n        __syncthreads();\n" + SUM


@pytest.mark.parametrize(
    ("text", "instead", "said"),
    [
        ("if (thread >= 32)", "if (thread >= 31)", "a lane that has left: 31"),
        (SUM, BARRED, "is elsewhere: 3"),
        ("(0xffffffffu, sum.total", "(0xfffffffeu, sum.total", "not name its own lane: 0"),
    ],
)
def test_a_shuffle_that_not_all_lanes_come_to_is_noticed(
    built: Path, tmp_path: Path, text: str, instead: str, said: str
) -> None:
    faulty = build_edited(tmp_path, built, "cross_entropy.cu", text, instead)
    call = (
        "library.statistics(Args(logits=start, columns=start, statistics=start, tokens=1, width=0))"
    )
    assert said in death(call, faulty)


def test_a_list_that_is_no_kernel_argument_does_not_compile(built: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="arguments of a kernel"):
        build_edited(tmp_path, built, "copy.cu", "kMany = 500", "kMany = 600")
