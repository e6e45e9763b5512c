# SPDX-License-Identifier: Apache-2.0
"""The most memory that the tensors made within a block have at once."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that are made within it, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.most = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage(t) for t in tree_leaves((args, kwargs)) if _storage(t) is not None}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = _storage(tensor)
            if storage is not None and storage not in known and storage not in self._seen:
                self._seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.most = max(self.most, self.live)
        return result

    def _gone(self, size: int) -> None:
        self.live -= size


def _storage(value: Any) -> Any:
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.device.type == "meta":
        return None
    return value.untyped_storage()
