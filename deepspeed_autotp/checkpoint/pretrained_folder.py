# SPDX-License-Identifier: Apache-2.0
"""A folder that ``from_pretrained`` loads: which of its files are in use, and how new ones come.

A loader reads ``model.safetensors`` or, without it, the files that ``model.safetensors.index.json``
names. So one rename, of the one or the other, replaces a checkpoint, as long as the files of the
new one have names that the old one does not use, and both have the same configuration. Where the
configuration is another one the whole folder is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed_autotp.checkpoint.atomic_folder import AtomicFolder

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ONE_OF_MANY = re.compile(r"model(.*?)-\d{5}-of-\d{5}\.safetensors")
# Keys of a configuration that say by what it was written, and what the weights show as well.
_WRITTEN_BY = frozenset({"architectures", "dtype", "torch_dtype", "transformers_version"})


@dataclass(frozen=True, slots=True)
class Index:
    """What an index says of several files."""

    total_parameters: int
    total_size: int
    files: Mapping[str, Sequence[str]]

    def text(self, names: Mapping[str, str]) -> str:
        """As transformers writes it, with ``names[file]`` in place of each file."""
        weight_map = {tensor: names[file] for file in self.files for tensor in self.files[file]}
        sizes = {"total_parameters": self.total_parameters, "total_size": self.total_size}
        content = {"metadata": sizes, "weight_map": weight_map}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def commit_weights(staged: AtomicFolder, index: Index) -> None:
    """Let the staged weights, and what is beside them, be what a loader finds in the folder.

    OSError where the folder has a checkpoint with another configuration and cannot be replaced.
    """
    files = list(index.files)
    others = sorted(entry.name for entry in staged.staging.iterdir() if entry.name not in files)
    names = _free_names(staged.folder, files)
    for file, name in names.items():
        (staged.staging / file).rename(staged.staging / name)
    last = SINGLE
    if len(files) > 1:
        last = INDEX
        (staged.staging / INDEX).write_text(index.text(names), encoding="utf-8")
    drop = [name for name in (SINGLE, INDEX) if name != last]
    drop += sorted(
        entry.name
        for entry in staged.folder.iterdir()
        if _ONE_OF_MANY.fullmatch(entry.name) and entry.name not in names.values()
    )
    if is_other_configuration(staged, "config.json", (SINGLE, INDEX, *_OTHER_WEIGHTS)):
        swap_folder(staged, drop=drop)
    else:
        shards = [name for name in names.values() if name != last]
        staged.commit([*others, *shards, last], drop=drop)


def swap_folder(staged: AtomicFolder, *, drop: Sequence[str] = ()) -> None:
    """Replace the folder; the error says why, and what to do."""
    try:
        staged.swap(drop=drop)
    except OSError as error:
        raise OSError(
            error.errno,
            f"save_pretrained: {str(staged.folder)!r} has a checkpoint with another configuration, "
            f"and the folder cannot be replaced in one step: {error.strerror}; save into an empty "
            "folder, or remove the checkpoint first",
        ) from error


def is_other_configuration(staged: AtomicFolder, config: str, weights: Sequence[str]) -> bool:
    """Whether the folder has ``weights`` that the staged ``config`` does not describe."""
    if not any((staged.folder / name).exists() for name in weights):
        return False
    return bool(_settings(staged.folder / config) != _settings(staged.staging / config))


def _free_names(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """Names for ``files`` of which the folder has none yet: their own where that is possible.

    A single file is replaced by its rename.
    """
    if len(files) == 1:
        return {file: file for file in files}
    mark, number = "", 1
    while any((folder / _marked(file, mark)).exists() for file in files):
        number += 1
        mark = f"-v{number}"
    return {file: _marked(file, mark) for file in files}


def _marked(file: str, mark: str) -> str:
    return file.replace("model", f"model{mark}", 1)


def _settings(file: Path) -> Any:
    """What a configuration says, or None where it cannot be read."""
    try:
        return _computed(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def _computed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _computed(each) for key, each in value.items() if key not in _WRITTEN_BY}
