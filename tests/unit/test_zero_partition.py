# SPDX-License-Identifier: Apache-2.0
"""Partitions have every element of every parameter once, whatever the number of ranks."""

from hypothesis import given
from hypothesis import strategies as st

from deepspeed_autotp.checkpoint.zero_partition import (
    Partition,
    flat_partitions,
    own_partitions,
    sub_groups,
)

numels = st.lists(st.integers(1, 40), min_size=1, max_size=8)
replicas = st.integers(1, 9)


def sizes_of(numels: list[int]) -> list[tuple[str, int]]:
    return [(f"p{index}", numel) for index, numel in enumerate(numels)]


def assert_complete(partitions: list[Partition], sizes: list[tuple[str, int]]) -> None:
    held: dict[str, list[int]] = {name: [] for name, _ in sizes}
    for partition in partitions:
        used: list[int] = []
        for piece in partition.pieces:
            assert piece.numel > 0
            held[piece.name] += range(piece.begin, piece.begin + piece.numel)
            used += range(piece.start, piece.start + piece.numel)
        assert sorted(used) == sorted(set(used))
        assert all(place < partition.size - partition.padding for place in used)
    assert held == {name: list(range(numel)) for name, numel in sizes}


@given(numels, replicas)
def test_flat_partitions_are_equal_and_complete(numels: list[int], replicas: int) -> None:
    partitions = flat_partitions(sizes_of(numels), replicas)
    assert_complete(partitions, sizes_of(numels))
    assert len({partition.size for partition in partitions}) == 1
    assert sum(p.size - p.padding for p in partitions) == sum(numels)


@given(numels, replicas)
def test_partitions_of_each_parameter_are_equal_and_complete(
    numels: list[int], replicas: int
) -> None:
    partitions = own_partitions(sizes_of(numels), replicas)
    assert_complete(partitions, sizes_of(numels))
    assert len({partition.size for partition in partitions}) == 1


@given(numels, replicas, st.integers(1, 60))
def test_sub_groups_keep_the_order_and_end_where_they_are_full(
    numels: list[int], replicas: int, most: int
) -> None:
    sizes = sizes_of(numels)
    groups = sub_groups(sizes, replicas, most)
    assert [name for group in groups for name in group] == [name for name, _ in sizes]
    share = {name: -(-numel // replicas) for name, numel in sizes}
    for group in groups[:-1]:
        assert sum(share[name] for name in group) >= most
        assert sum(share[name] for name in group[:-1]) < most
