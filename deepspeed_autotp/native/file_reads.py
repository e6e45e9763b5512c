# SPDX-License-Identifier: Apache-2.0
"""Rows of a file read into tensors on the CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType

from torch import Tensor

from deepspeed_autotp.native import operators

__all__ = ["OpenFiles"]


class OpenFiles:
    """Files that are opened at their first read, and closed with the context."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, out: Tensor, path: str, reads: Sequence[int]) -> None:
        """Fill the memory of ``out``, which is contiguous and on the CPU: for each read begin,
        rows, bytes of a row, stride, out_begin, out_stride, in bytes. ValueError where the file
        cannot be read or has ended."""
        operators.loaded().read_(out, path, self._descriptor(path), reads)

    def _descriptor(self, path: str) -> int:
        if path not in self._open:
            try:
                self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        return self._open[path]
