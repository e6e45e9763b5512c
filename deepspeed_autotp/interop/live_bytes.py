# SPDX-License-Identifier: Apache-2.0
"""Bytes that are alive while tensors are computed, of tensors with values and of fake ones.

Fake tensors have a shape, a data type and a device, and no memory (torch._subclasses).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_VALUE = torch.ops.aten._local_scalar_dense.default


class LiveBytes(TorchDispatchMode):
    """Counts the storages of what operations return, from their first use to their end.

    ``changed`` is called with the bytes alive after each storage that has come to be. What a branch
    of Python asks of a fake tensor of truth values is answered as for ordinary tokens: all are as
    they should be (``all``), and none is not (anything else), as a label that is out of range.
    """

    def __init__(self, changed: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._changed = changed
        self._sizes: dict[int, int] = {}
        self._true: set[int] = set()  # ids of fake tensors
        self.alive = 0

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the storages of ``tensors``."""
        for tensor in tensors:
            self._add(tensor, counted=False)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        others = set(types) - {Tensor, FakeTensor}
        if any("__torch_dispatch__" in vars(kind) for kind in others):
            return NotImplemented  # comes again, as operations on what such a tensor stands for
        given = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():  # such as RNG states, among fake ones
                result = func(*args, **given)
        elif func is _VALUE and tensors[0].dtype == torch.bool:
            return id(tensors[0]) in self._true
        else:
            result = func(*args, **given)
        if func.overloadpacket is torch.ops.aten.all and isinstance(result, FakeTensor):
            key = id(result)
            self._true.add(key)
            weakref.finalize(result, self._true.discard, key)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, counted=True)
        return result

    def _add(self, tensor: Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes() if counted else 0
        self._sizes[key] = size
        weakref.finalize(storage, self._drop, key)
        if size:
            self.alive += size
            self._changed(self.alive)

    def _drop(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


def has_no_values(tensor: Tensor) -> bool:
    """Whether a tensor is a fake one."""
    return isinstance(tensor, FakeTensor)


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within it operations give fake tensors on the device that they name.

    transformers takes them for ordinary ones: where it traces a graph it makes attention masks that
    a run does not make (masking_utils).
    """
    found = sys.modules.get("transformers.utils.import_utils")
    with ExitStack() as stack:
        if found is not None:
            stack.enter_context(mock.patch.object(found, "is_fake_tensor", lambda x: False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@contextmanager
def real_tensors() -> Iterator[None]:
    """A context in which operations have values, also within :func:`fake_tensors`."""
    with unset_fake_temporarily():
        yield


def make_fake(model: nn.Module) -> dict[int, nn.Parameter]:
    """Give ``model`` fake parameters, buffers and other tensors of modules, on the CPU, in the
    place of those on the meta device. The new parameters by the id of those of before; within
    :func:`fake_tensors`."""
    made: dict[int, nn.Parameter] = {}
    kept: list[object] = []  # so that no id is given twice
    for module in model.modules():
        values = vars(module)
        for name, parameter in values["_parameters"].items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                kept.append(parameter)
                made[id(parameter)] = _fake_parameter(parameter)
            values["_parameters"][name] = made[id(parameter)]
        for holder in (values["_buffers"], values):
            for name, value in list(holder.items()):
                if isinstance(value, Tensor) and value.device.type == "meta":
                    holder[name] = torch.empty_like(value, device="cpu")
    return made


def _fake_parameter(parameter: nn.Parameter) -> nn.Parameter:
    made = nn.Parameter(
        torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad
    )
    for name, value in vars(parameter).items():
        setattr(made, name, value)
    return made


def current_node() -> Any:
    """The node whose backward runs, or None."""
    return torch._C._current_autograd_node()


def label_nodes(output: Any, label: str) -> None:
    """Note ``label`` on the nodes of the graph behind ``output`` that have none."""
    waiting: list[Any] = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    while waiting:
        node = waiting.pop()
        if node is not None and _LABEL not in node.metadata:
            node.metadata[_LABEL] = label
            waiting.extend(following for following, _ in node.next_functions)


def node_label(node: Any) -> str:
    """What was noted on it, or nothing."""
    label: str = "" if node is None else node.metadata.get(_LABEL, "")
    return label


_LABEL = "deepspeed_autotp"
