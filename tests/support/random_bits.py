# SPDX-License-Identifier: Apache-2.0
"""Tensors of random bits, and the bits of a tensor."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex32,
    torch.complex64,
    torch.complex128,
)


def random_bits(
    shape: Sequence[int], dtype: torch.dtype, *, offset: int = 0, device: str = "cpu"
) -> Tensor:
    """Every bit pattern of the dtype, NaNs and negative zeros among them, ``offset`` elements off
    an aligned address."""
    size = (math.prod(shape) + offset) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return raw.to(device).view(dtype)[offset:].view(tuple(shape))


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, one more dimension behind."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)
