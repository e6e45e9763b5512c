# SPDX-License-Identifier: Apache-2.0
"""The layout of a safetensors file, known before any of its tensors is there.

The bytes are those that the library safetensors writes: 8 with the length of the header, the
header, which is JSON, and the tensors, those of wider dtypes first, then by name.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

# In the order in which safetensors 0.8 has them, of which a file has the last ones first.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES)}
_ALIGNMENT = 8


class Tensorlike(Protocol):
    """What has to be known of a tensor."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True, slots=True)
class FileLayout:
    """``begins`` says at which byte of the file each tensor begins; ``size`` is the file's."""

    header: bytes
    begins: Mapping[str, int]
    size: int


def file_layout(tensors: list[Tensorlike], *, metadata: Mapping[str, str]) -> FileLayout:
    """Where each of ``tensors`` is in a file of them. ValueError for a dtype without a name."""
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{tensor.name}: got {tensor.dtype}, expected a dtype that safetensors files have; "
                "convert the tensor before saving"
            )
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    ends = {}
    end = 0
    for tensor in sorted(tensors, key=lambda each: (-_ORDER[each.dtype], each.name.encode())):
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        ends[tensor.name] = begin
        entries[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    begins = {name: len(header) + begin for name, begin in ends.items()}
    return FileLayout(header, begins, len(header) + end)
