# SPDX-License-Identifier: Apache-2.0
"""Which torch functions keep the last dimension of a tensor as it is.

Facts about functions and their arguments; knows nothing of ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deepspeed_autotp.vocab_parallel.soft_cap import Step

_TENSOR: Mapping[str, Any] = {**vars(torch._C.TensorBase), **vars(Tensor)}
_PROPERTIES = (
    *("shape", "ndim", "dtype", "device", "layout", "requires_grad", "grad_fn", "is_leaf"),
    *("output_nr", "grad", "retains_grad", "is_cuda", "is_cpu", "is_xpu", "is_meta", "is_sparse"),
    *("is_quantized", "is_nested", "itemsize", "nbytes", "_version", "_backward_hooks"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "get_device"),
    *("is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_inference"),
    *("__len__", "register_hook", "retain_grad", "requires_grad_", "detach"),
)

# What needs no values of the tensor, and what concerns its gradient only. A view of the same shape
# is what autograd makes of an input that a function returns.
ABOUT: frozenset[Any] = frozenset(
    [_TENSOR[name].__get__ for name in _PROPERTIES]
    + [_TENSOR[name] for name in _METHODS]
    + [torch.is_floating_point, torch.is_complex, torch.numel, torch.detach, Tensor.view_as]
    + [torch.autograd.grad, torch.autograd.backward, Tensor.backward]
)

# Of these, what reads the gradient of a tensor that is not a leaf.
HOOKING: frozenset[Any] = frozenset([_TENSOR["register_hook"]])
WATCHING: frozenset[Any] = HOOKING | {_TENSOR["retain_grad"], torch.autograd.grad}

# These expose memory, or a tensor that shares no version counter, or write without a new version.
SHARING: frozenset[Any] = frozenset(
    [_TENSOR["data"].__get__, _TENSOR["data"].__set__]
    + [_TENSOR[name] for name in ("data_ptr", "untyped_storage", "numpy", "set_", "__array__")]
    + [_TENSOR[name] for name in ("storage", "__dlpack__")]
    + [dist.all_reduce, dist.all_reduce_coalesced, dist.broadcast, dist.recv, dist.irecv]
)

# Elementwise. The first do not read their first argument in their backward; what the others read,
# the argument or the result, must keep its values until then.
FORGETFUL: frozenset[Any] = frozenset(
    [_TENSOR[name] for name in ("add", "sub", "mul", "div", "true_divide", "neg")]
    + [_TENSOR[f"__{name}__"] for name in ("add", "radd", "sub", "rsub", "mul", "rmul", "neg")]
    + [_TENSOR["__truediv__"], torch.true_divide]
    + [torch.add, torch.sub, torch.mul, torch.div, torch.neg]
)
POINTWISE: frozenset[Any] = FORGETFUL | {
    *(Tensor.tanh, torch.tanh, F.tanh, Tensor.clamp, torch.clamp),
    *(Tensor.sigmoid, torch.sigmoid, F.sigmoid),
}

_STEPS: Mapping[Any, Any] = {
    **dict.fromkeys([_TENSOR[name] for name in ("div", "true_divide", "__truediv__")], torch.div),
    **dict.fromkeys([torch.div, torch.true_divide], torch.div),
    **dict.fromkeys([_TENSOR[name] for name in ("mul", "__mul__", "__rmul__")], torch.mul),
    **dict.fromkeys([torch.mul], torch.mul),
    **dict.fromkeys([Tensor.tanh, torch.tanh, F.tanh], torch.tanh),
}

# Another shape of the same values in the same order.
SHAPING: frozenset[Any] = frozenset(
    {
        *(Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten),
        *(Tensor.squeeze, torch.squeeze, Tensor.unsqueeze, torch.unsqueeze, Tensor.unflatten),
    }
)
COPYING: frozenset[Any] = frozenset({Tensor.contiguous, Tensor.clone, torch.clone})

_CASTS: Mapping[Any, torch.dtype] = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}


def step(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step | None:
    """The step that the call applies to its first argument, by a Python number; else None."""
    operation, rest = _STEPS.get(func), args[1:]
    if operation is None or kwargs:
        return None
    if operation is torch.tanh:
        return None if rest else Step(operation)
    if len(rest) != 1 or type(rest[0]) not in (int, float):
        return None
    return Step(operation, rest[0])


def watched(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """The tensors whose gradient the call reads."""
    if func not in WATCHING:
        return ()
    if func is not torch.autograd.grad:
        return args[:1]
    inputs = kwargs.get("inputs", args[1] if len(args) > 1 else ())
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def cast_to(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device
) -> torch.dtype | None:
    """The dtype of a call that casts and does nothing else, or None for any other call."""
    rest = args[1:]
    if func in _CASTS and not rest and not kwargs:
        return _CASTS[func]
    if func is not Tensor.to or not rest and not kwargs:
        return None
    if any(isinstance(value, Tensor) for value in (*rest, *kwargs.values())) or "copy" in kwargs:
        return None
    place, dtype, _, form = torch._C._nn._parse_to(*rest, **kwargs)
    if form is not None or dtype is None or (place is not None and place != device):
        return None
    return dtype


def other_shape(func: Any, shape: torch.Size, args: Sequence[Any]) -> torch.Size | None:
    """The shape that one of SHAPING gives to ``shape``, where rows stay rows; else None.

    Raises what ``func`` raises for a shape that does not fit.
    """
    given: torch.Size = func(torch.empty(shape, device="meta"), *args).shape
    kept = len(given) > 0 and given[-1] == shape[-1] and given.numel() == shape.numel()
    return given if kept else None


def keeps_columns(index: Any, dims: int) -> bool:
    """Whether ``x[index]`` of a tensor with ``dims`` dimensions has the last one as it was."""
    items = index if isinstance(index, tuple) else (index,)
    taken = 0
    open_end = True
    for item in items:
        if item is Ellipsis:
            open_end = False
        elif isinstance(item, Tensor) and item.dtype == torch.bool and item.dim() > 0:
            taken += item.dim()
        elif isinstance(item, slice) or type(item) is int or _integers(item):
            taken += 1
        else:
            return False
    if open_end and taken < dims:
        return True
    last = items[-1]
    return last is Ellipsis or (isinstance(last, slice) and last == slice(None))


def _integers(item: object) -> bool:
    kinds = (torch.int64, torch.int32)
    return isinstance(item, Tensor) and item.dtype in kinds and item.dim() > 0


@dataclass(frozen=True, slots=True)
class LossCall:
    """Cross-entropy of rows of logits and one label a row, with the options that are left."""

    logits: Tensor
    labels: Tensor
    ignore_index: int
    reduction: str


_LOSS = inspect.signature(F.cross_entropy)


def loss_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> LossCall | None:
    """The arguments of ``F.cross_entropy``, or None with weights, label smoothing and the like."""
    given = _LOSS.bind(*args, **kwargs)
    given.apply_defaults()
    values = given.arguments
    logits, labels, reduction = values["input"], values["target"], values["reduction"]
    plain = (
        values["weight"] is None
        and values["size_average"] is None
        and values["reduce"] is None
        and values["label_smoothing"] == 0
        and reduction in ("none", "mean", "sum")
    )
    if not plain or not isinstance(logits, Tensor) or type(labels) is not Tensor:
        return None
    if logits.dim() != 2 or labels.dtype != torch.int64 or labels.device != logits.device:
        return None
    if labels.shape != logits.shape[:1]:
        return None
    return LossCall(logits, labels, values["ignore_index"], reduction)
