# SPDX-License-Identifier: Apache-2.0
"""What counts as a leak."""

from tests.support.resource_samples import Sample, steady


def samples(*bytes_of_malloc: int) -> list[Sample]:
    return [Sample(10 * at, {}, 0, held, 0) for at, held in enumerate(bytes_of_malloc)]


def test_a_leak_is_what_grows_each_time() -> None:
    assert steady(samples(0, 5000, 10000, 15000, 20000), "malloc") == 500
    assert steady(samples(0, 5000, 10000, 4_000_000, 4_005_000), "malloc") == 500


def test_a_cache_that_fills_once_is_none() -> None:
    assert steady(samples(0, 0, 0, 4_000_000, 4_000_000), "malloc") == 0
