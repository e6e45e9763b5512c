# SPDX-License-Identifier: Apache-2.0
"""Which architectures a CUDA library holds code for, read from the file itself.

A fat binary is a header (magic number, version, its own size, the size of what follows) and a
sequence of entries, each with a header of its own (kind, version, its size, the size of its code,
and at byte 28 the architecture). nvcc 13.0 writes it so; cuobjdump, which says the same, is not
installed everywhere.
"""

import struct
from pathlib import Path

_MAGIC = struct.pack("<I", 0xBA55ED50)
_PTX, _MACHINE = 1, 2


def architectures(library: Path) -> list[tuple[set[int], set[int]]]:
    """Of every fat binary that holds code for several: (machine code, intermediate code)."""
    data = library.read_bytes()
    found = []
    at = data.find(_MAGIC)
    while at >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, at)
        kinds: dict[int, set[int]] = {_PTX: set(), _MACHINE: set()}
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, length, code = struct.unpack_from("<HHIQ", data, entry)
            kinds[kind].add(struct.unpack_from("<I", data, entry + 28)[0])
            entry += length + code
        found.append((kinds[_MACHINE], kinds[_PTX]))
        at = data.find(_MAGIC, end)
    return found
