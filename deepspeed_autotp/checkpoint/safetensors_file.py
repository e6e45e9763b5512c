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

from deepspeed_autotp.config.dtypes import SAFETENSORS_NAMES

# A file has tensors of the last dtype first.
_ORDER = {dtype: place for place, dtype in enumerate(SAFETENSORS_NAMES)}
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
        if tensor.dtype not in SAFETENSORS_NAMES:
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
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    begins = {name: len(header) + begin for name, begin in ends.items()}
    return FileLayout(header, begins, len(header) + end)
