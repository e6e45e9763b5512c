# SPDX-License-Identifier: Apache-2.0
"""The kernel of a lookup, run on a CPU in several orders of its blocks and threads; and that a
fault in it is noticed."""

from pathlib import Path

import pytest
import torch

from tests.support.emulated_cuda import ORDERS, Copy, Library, Lookup, build, build_edited

INVALID_CONFIGURATION = 9
START, ROWS, SIZE = 30, 11, 50


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def library(built: Path) -> Library:
    return Library(built)


def lookup_of(word: int, row_bytes: int, tokens: int) -> Lookup:
    pitches = {"source_pitch": row_bytes, "target_pitch": row_bytes}
    copy = Copy(**pitches, rows=tokens, row_bytes=row_bytes, word=word)
    return Lookup(copy=copy, start=START, rows=ROWS, vocabulary=SIZE, id_bytes=8)


def check_lookups(library: Library, word: int) -> None:
    """Many rows in a tile, one, and parts of one; all of the memory is compared."""
    tile = 1024 if word == 16 else 2048
    for tokens, words in ((1, 1), (70, 3), (257, 33), (5, tile), (5, tile - 1), (3, 2 * tile + 1)):
        row_bytes = words * word
        weight = torch.randint(1, 256, (ROWS, row_bytes), dtype=torch.uint8)
        ids = torch.arange(-1, tokens - 1) * 7 % (SIZE + 1)
        ids[0] = START
        memory = torch.full((16 + (tokens + 1) * row_bytes,), 77, dtype=torch.uint8)
        expected = memory.clone()
        rows = expected[16 : 16 + tokens * row_bytes].view(tokens, row_bytes)
        own = (ids >= START) & (ids < START + ROWS)
        rows.zero_()
        rows[own] = weight[ids[own] - START]
        rows[ids == SIZE] = 255
        lookup = lookup_of(word, row_bytes, tokens)
        lookup.copy.source, lookup.copy.target = weight.data_ptr(), memory.data_ptr() + 16
        lookup.ids = ids.data_ptr()
        assert library.lookup(lookup) == 0
        assert torch.equal(memory, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("word", [1, 2, 4, 8, 16])
def test_a_lookup_writes_what_it_shall_and_no_more(library: Library, word: int, order: int) -> None:
    library.order(order)
    check_lookups(library, word)


def test_nothing_to_look_up_starts_nothing_and_too_much_is_an_error(library: Library) -> None:
    before = library.launches
    assert library.lookup(lookup_of(1, 0, 4)) == library.lookup(lookup_of(1, 4, 0)) == 0
    assert library.lookup(lookup_of(1, 1 << 20, 1 << 40)) == INVALID_CONFIGURATION
    assert library.launches == before


def test_an_error_of_a_launch_is_told_once(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMULATED_ERROR", "209")
    assert library.lookup(lookup_of(1, 4, 4)) == 209
    assert library.error_left == 0


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("at < tile.words)\n            *rein", "at <= tile.words)\n            *rein"),
        ("at < tile.words)\n            *rein", "at < tile.words - 1)\n            *rein"),
        ("? 0xff : 0", "? 0 : 0xff"),
        ("from[i] >= 0", "from[i] > 0"),
        ("&tile, index)", "&tile, index + 1)"),
    ],
)
def test_a_fault_in_the_kernel_is_noticed(
    built: Path, tmp_path: Path, text: str, instead: str
) -> None:
    faulty = Library(build_edited(tmp_path, built, "embedding_lookup.cu", text, instead))
    with pytest.raises(AssertionError):
        check_lookups(faulty, 4)
