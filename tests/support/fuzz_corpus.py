# SPDX-License-Identifier: Apache-2.0
"""The inputs of a fuzz target, one a line in hexadecimal digits, as a folder of files and back:
``fuzz_corpus.py unpack FILE FOLDER`` and ``... pack FILE FOLDER``."""

import hashlib
import sys
from pathlib import Path


def unpack(file: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines() if file.exists() else []
    for data in map(bytes.fromhex, lines):
        Path(folder, hashlib.sha1(data).hexdigest()).write_bytes(data)


def pack(file: Path, folder: Path) -> None:
    """In an order that does not change with what is added: short ones first."""
    inputs = sorted((path.read_bytes() for path in folder.iterdir()), key=lambda x: (len(x), x))
    file.write_text("".join(f"{data.hex()}\n" for data in inputs))


if __name__ == "__main__":
    {"pack": pack, "unpack": unpack}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
