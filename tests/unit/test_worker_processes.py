# SPDX-License-Identifier: Apache-2.0
"""Items of work over several processes."""

from functools import partial

import pytest

from deepspeed_autotp.checkpoint.worker_processes import Advance, Work, do_all


class OwnError(ValueError):
    """Cannot be made again from what it was pickled as."""

    def __init__(self, item: int, *, words: str) -> None:
        super().__init__(f"{item}: {words}")


def start(failing: int | None) -> Work[int]:
    return partial(work, failing)


def work(failing: int | None, item: int, done: Advance) -> None:
    if item == failing:
        raise OwnError(item, words="is wrong")
    done(item)


@pytest.mark.parametrize("jobs", [1, 2])
def test_all_items_are_done_and_an_error_is_that_of_an_item(jobs: int) -> None:
    told: list[int] = []
    do_all(partial(start, None), [1, 2, 3], jobs=jobs, done=told.append)
    assert sorted(told) == [1, 2, 3]
    with pytest.raises(ValueError, match="2: is wrong"):
        do_all(partial(start, 2), [1, 2, 3], jobs=jobs, done=told.append)
