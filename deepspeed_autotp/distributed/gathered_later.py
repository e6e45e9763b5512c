# SPDX-License-Identifier: Apache-2.0
"""A full tensor of which this rank has a shard, gathered when its values are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed_autotp.interop.torch_private import plain_results, with_leaves


class GatheredLater(Tensor):
    """Has shape, dtype and device, which are read without a collective. A use of the values
    gathers them first, which every rank does or none."""

    _full: Tensor | None = None

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        # Without values: printing on one rank must not wait for the others.
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}; gathered when used)"

    def _gather(self) -> Tensor:
        """The values, without their gradient. Every rank calls it."""
        raise NotImplementedError

    def full(self) -> Tensor:
        """The values, gathered at the first call. Every rank calls it."""
        if self._full is None:
            with torch.no_grad():
                self._full = self._gather()
        return self._full

    def data_ptr(self) -> int:
        """Of the values, for kernels that are no operations of torch."""
        return self.full().data_ptr()

    # What shape, dtype and device are is known without the values, and never comes here.
    __torch_function__ = plain_results()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # What writes is given the values, too, which later uses are given.
        args, named = with_leaves(cls, cls.full, (tuple(args), dict(kwargs or {})))
        return func(*args, **named)
