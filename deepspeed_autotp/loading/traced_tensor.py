# SPDX-License-Identifier: Apache-2.0
"""A tensor without values that remembers from which tensors of a checkpoint it is made.

A loader that is given such tensors renames, stacks, concatenates and casts them as ever, and leaves
in the model how each parameter is made. A slice of a parameter is then made from slices of the
files. What is not known to keep slices apart is recorded as a call, and later made in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from deepspeed_autotp.interop.torch_private import with_leaves
from deepspeed_autotp.loading.stored_tensor import Stored

__all__ = [
    "Cast",
    "Computed",
    "Concatenated",
    "Narrowed",
    "Origin",
    "Stacked",
    "Swapped",
    "TracedTensor",
    "traced",
]


@dataclass(frozen=True, slots=True)
class Cast:
    """In another data type."""

    of: Origin
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Stacked:
    """One after the other along the new dimension ``dim``."""

    parts: tuple[Origin, ...]
    dim: int


@dataclass(frozen=True, slots=True)
class Concatenated:
    """One after the other along ``dim``, ``sizes`` long each."""

    parts: tuple[Origin, ...]
    sizes: tuple[int, ...]
    dim: int


@dataclass(frozen=True, slots=True)
class Narrowed:
    """From ``start`` along ``dim``."""

    of: Origin
    dim: int
    start: int


@dataclass(frozen=True, slots=True)
class Swapped:
    """With two dimensions in each other's place."""

    of: Origin
    first: int
    second: int


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """The result of a function of torch, or its result number ``item``; made from full tensors."""

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    item: int | None


Origin = Stored | Cast | Stacked | Concatenated | Narrowed | Swapped | Computed


class TracedTensor(Tensor):
    """On the meta device; ``origin`` says how it is made."""

    origin: Origin

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func in _CASTS:
            return _cast(args, kwargs)
        if func in _LIKE:
            # Of a model that draws values for what the checkpoint does not have.
            plain: Any = torch.empty(args[0].shape, dtype=args[0].dtype)
            return func(plain, *args[1:], **kwargs)
        before = args[0].origin if _changes(func, args) else None
        run: Any = super().__torch_function__
        result = run(func, types, args, kwargs)
        if func == _SET_DATA:
            args[0].origin = _assigned(args[1])
        elif before is not None:
            args[0].origin = _changed(before, func, args, kwargs)
        elif isinstance(result, TracedTensor) and not any(result is each for each in args):
            result.origin = _origin(func, args, kwargs, result)
        elif isinstance(result, (tuple, list)):
            _trace_all(func, args, kwargs, result)
        return result


def traced(stored: Stored) -> TracedTensor:
    """A tensor of a checkpoint, as it is there."""
    empty = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
    return _with_origin(empty, stored)


def _untraced(tensor: Tensor) -> Tensor:
    """The same on the meta device, without its origin."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _with_origin(tensor: Tensor, origin: Origin) -> TracedTensor:
    made = tensor.as_subclass(TracedTensor)
    made.origin = origin
    return made


_ASSIGNMENTS = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "and", "or", "xor", "pow")
)
_DATA: Any = Tensor.data
_SET_DATA = _DATA.__set__
_CASTS = (Tensor.to, Tensor.cpu, Tensor.cuda)
_SAME = (Tensor.detach, torch.detach, Tensor.contiguous, Tensor.clone, torch.clone)
_PARTED: tuple[tuple[Callable[..., Any], ...], ...] = (
    (torch.chunk, Tensor.chunk),
    (torch.split, Tensor.split),
)
_SWAPS = (torch.transpose, Tensor.transpose)
_LIKE = (
    torch.empty_like,
    torch.full_like,
    torch.ones_like,
    torch.rand_like,
    torch.randn_like,
    torch.zeros_like,
)


def _cast(args: Sequence[Any], kwargs: Mapping[str, Any]) -> TracedTensor:
    """Of ``Tensor.to`` and the like, in any of its forms; the device is of no meaning yet."""
    own = args[0]
    others = (*args[1:], *kwargs.values())
    dtypes = [each for each in others if isinstance(each, torch.dtype)]
    dtypes += [each.dtype for each in others if isinstance(each, Tensor)]
    if not dtypes or dtypes[0] == own.dtype:
        return own  # type: ignore[no-any-return]
    empty = torch.empty(own.shape, dtype=dtypes[0], device="meta")
    return _with_origin(empty, Cast(own.origin, dtypes[0]))


def _origin(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
) -> Origin:
    if func in _SAME or (func is Tensor.__getitem__ and args[1] is ...):
        return args[0].origin  # type: ignore[no-any-return]
    if func in _SWAPS:
        swapped: dict[str, int] = dict(zip(("dim0", "dim1"), args[1:], strict=False)) | {**kwargs}
        dims = [swapped[key] % result.dim() for key in ("dim0", "dim1")]
        return Swapped(args[0].origin, *dims)
    if func in (torch.stack, torch.cat) and "out" not in kwargs:
        return _joined(func, args, kwargs, result)
    return _computed(func, args, kwargs, None)


def _computed(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], item: int | None
) -> Computed:
    """With its arguments as they are now: their origins may change."""

    def as_now(given: TracedTensor) -> TracedTensor:
        return _with_origin(_untraced(given), given.origin)

    args, kwargs = with_leaves(TracedTensor, as_now, (list(args), dict(kwargs)))
    return Computed(func, args, kwargs, item)


def _joined(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
) -> Origin:
    parts: Sequence[Tensor] = kwargs["tensors"] if "tensors" in kwargs else args[0]
    given = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    dim = given % result.dim()
    # cat takes tensors of several data types, and of one dimension without elements.
    alike = all(
        isinstance(part, TracedTensor)
        and part.dtype == result.dtype
        and part.dim() == result.dim() - (func is torch.stack)
        for part in parts
    )
    if not alike:
        return _computed(func, args, kwargs, None)
    origins = tuple(part.origin for part in parts if isinstance(part, TracedTensor))
    if func is torch.stack:
        return Stacked(origins, dim)
    return Concatenated(origins, tuple(part.shape[dim] for part in parts), dim)


def _trace_all(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], results: Sequence[Any]
) -> None:
    """Give each of several results its origin."""
    made = [each for each in results if isinstance(each, TracedTensor)]
    if not made:
        return
    if any(func in each for each in _PARTED):
        dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % made[0].dim()
        starts = accumulate((each.shape[dim] for each in made), initial=0)
        for each, start in zip(made, starts, strict=False):
            each.origin = Narrowed(args[0].origin, dim, start)
        return
    for item, each in enumerate(results):
        if isinstance(each, TracedTensor):
            each.origin = _computed(func, args, kwargs, item)


def _changes(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether it writes to its first argument, a traced tensor."""
    name = str(func.__name__)
    if func is Tensor.requires_grad_ or not args or not isinstance(args[0], TracedTensor):
        return False
    is_in_place = name.endswith("_") and not name.endswith("__")
    return is_in_place or func is Tensor.__setitem__ or name in _ASSIGNMENTS


def _changed(
    before: Origin, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Origin:
    """The origin of a tensor of which elements were set."""
    if func is not Tensor.__setitem__ or isinstance(before, (Narrowed, Swapped, Computed)):
        raise NotImplementedError(
            f"{func.__name__} writes to a tensor that is still in a file; load the model on every "
            "rank and shard it then"
        )
    return _computed(_with_item, args, kwargs, None)


def _assigned(value: Any) -> Origin:
    """The origin of what is given other data."""
    if not isinstance(value, TracedTensor):
        raise NotImplementedError(
            "a tensor that is still in a file is given other values; load the model on every rank "
            "and shard it then"
        )
    return value.origin


def _with_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    copy = tensor.clone()
    copy[index] = value
    return copy
