# SPDX-License-Identifier: Apache-2.0
"""4-bit weights of bitsandbytes: what is in them, what they become, and the product with them.

A weight [O, I] is kept as blocks of so many elements that follow one another, row by row: two
elements in a byte, and one scale (absmax) for a block. With nested quantisation the scales are
kept in 8 bits, in blocks of their own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_ELEMENTS_PER_BYTE = 2
# How the names of tensors end that a state dict has beside a weight in 4 bits.
BESIDE_4BIT = (".weight.absmax", ".weight.quant_map")


def is_4bit(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a weight that bitsandbytes keeps in 4 bits, or is to."""
    library: Any = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(tensor, library.nn.Params4bit)


def is_linear_4bit(module: nn.Module) -> bool:
    """Whether ``module`` is a linear with such a weight."""
    library: Any = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, library.nn.Linear4bit)


def shape_of_4bit(tensor: Tensor) -> tuple[int, ...] | None:
    """``[O, I]`` of a weight in 4 bits, or None for any other tensor."""
    state: Any = getattr(tensor, "quant_state", None) if is_4bit(tensor) else None
    return None if state is None else tuple(state.shape)


def block_size(weight: Tensor) -> int:
    """The elements of a block. ValueError, which begins with what was got, for a weight that
    cannot be taken apart."""
    given: Any = weight
    if given.quant_state is None:
        raise ValueError(
            "got a weight that bitsandbytes has not quantised yet, expected one in 4 bits: move "
            "the model to its device before it is sharded, on every rank"
        )
    if getattr(given.quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            "got a weight that a forward in evaluation mode has packed anew for the CPU, expected "
            "one as it was loaded: load the model again, and shard it before it is run"
        )
    if given.dtype != torch.uint8:
        raise ValueError(f"bnb_4bit_quant_storage: got {given.dtype}, expected torch.uint8")
    return int(given.quant_state.blocksize)


def packed_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[blocks * bytes]`` elements, and ``[blocks]`` scales in float32, of a weight in 4 bits."""
    given: Any = weight
    state = given.quant_state
    scales: Tensor = state.absmax
    if state.nested:
        functional = importlib.import_module("bitsandbytes.functional")
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return given.data.reshape(-1), scales.float().reshape(-1)


def block_bytes(weight: Tensor) -> int:
    """The bytes of the elements of a block."""
    return block_size(weight) // _ELEMENTS_PER_BYTE


def set_blocks(
    weight: Tensor, elements: Tensor, scales: Tensor, shape: Sequence[int]
) -> Callable[[], None]:
    """Let ``weight`` be a weight of ``shape``, of such blocks; returns the undo. Its scales are
    nested no more: quantised anew they would be others."""
    given: Any = weight
    data, state = given.data, vars(given.quant_state)  # which its module has, too
    before = dict(state)
    given.data = elements.reshape(-1, 1)
    state.update(absmax=scales, shape=torch.Size(shape), nested=False, offset=None, state2=None)

    def back() -> None:
        given.data = data
        state.clear()
        state.update(before)

    return back


def tensors_of_4bit(weight: Tensor) -> list[Tensor]:
    """What belongs to a weight in 4 bits beside its elements."""
    given: Any = weight
    state = given.quant_state
    if state is None:
        return []
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *nested]


def product_4bit(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """``[T, I] -> [T, O]``: ``x @ w.T + bias`` as the forward of a ``Linear4bit`` has it, but that
    it never packs the weight anew."""
    linear: Any = module
    if shape_of_4bit(linear.weight) is None:
        raise RuntimeError(
            f"the weight of a {type(module).__name__} is one in 4 bits no more, as after "
            "fully_shard, and its scales are not known; train it by initialize, in "
            "DistributedDataParallel, or without data parallelism"
        )
    if not linear.compute_type_is_set:
        linear.set_compute_type(x)
        linear.compute_type_is_set = True
    dtype = x.dtype
    if linear.compute_dtype is not None:
        x = x.to(linear.compute_dtype)
    library: Any = sys.modules["bitsandbytes"]
    bias = None if bias is None else bias.to(x.dtype)
    y: Tensor = library.matmul_4bit(
        x, linear.weight, bias=bias, quant_state=linear.weight.quant_state
    )
    return y.to(dtype)


@contextmanager
def computing_in_float32(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Within it, products with weights in 4 bits are formed in float32, if ``enabled``, and no
    forward packs weights anew for the CPU."""
    linears: list[Any] = [module for module in model.modules() if is_linear_4bit(module)]
    keys = ("compute_dtype", "compute_type_is_set", "support_avx512bf16_for_cpu")
    before = [{key: vars(linear)[key] for key in keys if key in vars(linear)} for linear in linears]
    try:
        for linear in linears:
            linear.support_avx512bf16_for_cpu = False
            if enabled:
                linear.compute_dtype, linear.compute_type_is_set = torch.float32, True
        yield
    finally:
        for linear, values in zip(linears, before, strict=True):
            vars(linear).update(values)
