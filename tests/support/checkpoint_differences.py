# SPDX-License-Identifier: Apache-2.0
"""What differs between two checkpoints of DeepSpeed."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

# What the configuration of the run that loads has to say besides the TP size.
_OF_CONFIG = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "stage3_gather_16bit_weights_on_model_save",
)


def differences(one: str, other: str) -> list[str]:
    """Where the files of two checkpoints differ, in names or in what they hold, bit for bit, but
    for batch sizes in the configuration."""
    folders = [Path(one), Path(other)]
    names = [
        {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} for folder in folders
    ]
    found = [f"{name} is in one of them" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        files = [folder / name for folder in folders]
        if name.endswith(".pt"):
            values = [torch.load(file, weights_only=False) for file in files]
            found += [f"{name}: {text}" for text in _unequal(*values)]
            sizes = [file.stat().st_size for file in files]
            if max(sizes) > 1.05 * min(sizes) + 4096:
                found.append(f"{name}: {sizes} bytes")
        elif files[0].read_bytes() != files[1].read_bytes():
            found.append(f"{name}: other bytes")
    return found


def _unequal(one: Any, other: Any, where: str = "") -> Iterator[str]:
    if type(one) is not type(other):
        yield f"{where} is a {type(one).__name__} and a {type(other).__name__}"
    elif isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            yield f"{where}: {one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
        elif not torch.equal(_bits(one), _bits(other)):
            yield f"{where}: other values"
    elif isinstance(one, Mapping):
        left_out = _OF_CONFIG if where.startswith("['ds_config']") else ()
        for key in (one.keys() ^ other.keys()).difference(left_out):
            yield f"{where}[{key!r}] is in one of them"
        for key in (one.keys() & other.keys()).difference(left_out):
            yield from _unequal(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            yield f"{where}: {len(one)} and {len(other)}"
        for index, pair in enumerate(zip(one, other, strict=False)):
            yield from _unequal(*pair, f"{where}[{index}]")
    elif hasattr(one, "__dict__") and not isinstance(one, type):
        yield from _unequal(vars(one), vars(other), f"{where}.")
    elif one != other:
        yield f"{where}: {one} and {other}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
