# SPDX-License-Identifier: Apache-2.0
"""The tensors of a safetensors file, from its header.

The format (https://github.com/huggingface/safetensors#format): 8 bytes, the length N of the header
as a little-endian integer; N bytes of JSON; the tensors' bytes, without gaps. A header that says
anything else of its file is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepspeed_autotp.base.printable import printable
from deepspeed_autotp.config.dtypes import SAFETENSORS_NAMES
from deepspeed_autotp.config.json_text import parsed_json
from deepspeed_autotp.loading.stored_tensor import FileTensor

_LENGTH = 8
_LARGEST_HEADER = 100_000_000
# Of a tensor, so that its bytes are counted in 64 bits; also where another size of it is 0.
_MOST_ELEMENTS = 2**59
_MOST_DIMS = 64
_LONGEST_NAME = 4096
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


def stored_tensors(path: Path) -> dict[str, FileTensor]:
    """Each tensor of the file by name. ValueError for what is no whole safetensors file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(_LENGTH)
            length = int.from_bytes(header, "little")
            if len(header) < _LENGTH or length > min(size - _LENGTH, _LARGEST_HEADER):
                raise _wrong(
                    path,
                    f"its header would have {length} bytes, but the file has {size}",
                )
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    entries = _entries(path, text)
    begin = _LENGTH + length
    found = {name: _tensor(path, name, entry, begin) for name, entry in entries.items()}
    _check_places(path, list(found.values()), begin, size)
    return found


def _entries(path: Path, text: bytes) -> dict[str, Any]:
    try:
        entries = parsed_json(text.decode("utf-8"))
    except ValueError as error:  # of the encoding, or of JSON
        raise _wrong(path, f"its header is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise _wrong(path, "its header is no JSON object")
    notes = entries.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise _wrong(path, "its __metadata__ is no object of texts")
    longest = max(map(len, entries), default=0)
    if longest > _LONGEST_NAME:
        raise _wrong(path, f"a name in its header has {longest} characters")
    return entries


def _tensor(path: Path, name: str, entry: Any, begin: int) -> FileTensor:
    values = entry if isinstance(entry, dict) else {}
    shape, offsets = _counts(values.get("shape")), _counts(values.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise _wrong(path, f"its header does not say the shape and the place of {name}")
    if len(shape) > _MOST_DIMS or math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS:
        raise _wrong(path, f"{name} has a shape of more elements than there can be")
    spelling = str(values.get("dtype"))
    dtype = _DTYPES.get(spelling)
    if dtype is None:
        raise _wrong(path, f"{name} has the data type {spelling!r}, which is not known")
    tensor = FileTensor(name, str(path), dtype, shape, begin + offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise _wrong(
            path,
            f"{name} of shape {list(shape)} in {spelling} has {tensor.nbytes} bytes, but its "
            f"header gives it {offsets[1] - offsets[0]}",
        )
    return tensor


def _counts(values: Any) -> tuple[int, ...] | None:
    if isinstance(values, list) and all(type(v) is int and v >= 0 for v in values):
        return tuple(values)
    return None


def _check_places(path: Path, tensors: Sequence[FileTensor], begin: int, size: int) -> None:
    """ValueError unless the tensors fill the rest of the file, one after the other."""
    end = begin
    for tensor in sorted(tensors, key=lambda each: (each.begin, each.nbytes)):
        if tensor.begin != end:
            raise _wrong(path, f"{tensor.name} begins at byte {tensor.begin}, expected {end}")
        end += tensor.nbytes
    if end > size:
        raise _wrong(path, f"it has {size} bytes, but its header speaks of {end}: it is truncated")
    if end < size:
        raise _wrong(path, f"it has {size} bytes, but its header speaks of {end} only")


def _wrong(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} is no whole safetensors file: {printable(why)}; download it or save it anew"
    )
