# SPDX-License-Identifier: Apache-2.0
"""Files of ``torch.save`` of others, before and after ``torch.load``.

``weights_only`` keeps it from running code. What is left is their size: a few bytes can be
unpacked to any number of them.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed_autotp.base.nested_values import held_values

# Of lists, dictionaries and their values, one that is in two of them counted twice.
_MOST_VALUES = 2_000_000


def check_archive(file: Path) -> None:
    """ValueError for an archive that holds more bytes than it has. ``torch.save`` compresses
    nothing; a file that is no archive is of an older version of it."""
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as opened:
            records = opened.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"its end is damaged: {error}") from None
    size, held = file.stat().st_size, sum(record.file_size for record in records)
    if held > size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError(
            f"it would be unpacked from {size} to {held} bytes, expected a file of torch.save, "
            "which is not compressed"
        )


def check_loaded(value: Any, file: Path) -> None:
    """ValueError where ``value``, which ``file`` holds, is more than that: a tensor of more bytes
    than the file, one without values, or containers in each other that multiply."""
    size, count = file.stat().st_size, 0
    left = [value]
    while left:
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES} values, or itself")
        each = left.pop()
        if isinstance(each, Tensor):
            _check_tensor(each, size)
        else:
            left.extend(held_values(each))


def _check_tensor(tensor: Tensor, size: int) -> None:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError(
            f"it holds a tensor of layout {tensor.layout} on {tensor.device}, expected one with "
            "all of its values"
        )
    if tensor.numel() * tensor.element_size() > size:
        raise ValueError(
            f"it has {size} bytes and holds a tensor of shape {list(tensor.shape)}, which has more"
        )
