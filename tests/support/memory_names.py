# SPDX-License-Identifier: Apache-2.0
"""The names of shared memory that this process makes or opens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor

from deepspeed_autotp.distributed import shared_memory


@contextmanager
def noting_memory(note: Callable[[str], object]) -> Iterator[None]:
    """A context in which ``note`` is given each name, before there is memory of it."""
    name_of = shared_memory._name

    def noted(token: Tensor) -> str:
        note(name_of(token))
        return name_of(token)

    with mock.patch.object(shared_memory, "_name", noted):
        yield
