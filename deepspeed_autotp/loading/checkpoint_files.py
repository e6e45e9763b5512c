# SPDX-License-Identifier: Apache-2.0
"""The stored tensors of a checkpoint of one file or of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from deepspeed_autotp.base.printable import printable
from deepspeed_autotp.config.json_text import read_json
from deepspeed_autotp.interop.torch_archive import check_archive
from deepspeed_autotp.loading.safetensors_header import stored_tensors
from deepspeed_autotp.loading.stored_tensor import LoadedTensor, Stored

_SAFETENSORS = ".safetensors"
_NAMED = 3
_LARGEST_INDEX = 100_000_000


def checkpoint_tensors(
    files: Sequence[str], load_pickled: Callable[[str], Mapping[str, Tensor]]
) -> dict[str, Stored]:
    """Each tensor by its name; ``load_pickled`` opens a file that is not safetensors.

    ValueError for a file that is damaged, for a name in several files, and for an index beside
    the files that says otherwise.
    """
    found: dict[str, Stored] = {}
    for file in files:
        stored: Mapping[str, Stored]
        if file.endswith(_SAFETENSORS):
            stored = stored_tensors(Path(file))
        else:
            stored = _pickled(file, load_pickled)
        for name, tensor in stored.items():
            if name in found:
                raise ValueError(
                    f"{printable(name)} is in {file} and in another file of the checkpoint"
                )
            found[name] = tensor
    if len(files) > 1:
        _check_index(files, found)
    return found


def _pickled(
    file: str, load_pickled: Callable[[str], Mapping[str, Tensor]]
) -> dict[str, LoadedTensor]:
    try:
        check_archive(Path(file))
        tensors = load_pickled(file)
    except Exception as error:  # whatever torch.load raises for what it cannot read
        raise ValueError(f"{file} cannot be loaded: {printable(str(error))}") from None
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{file} holds {type(tensors).__name__}, expected tensors by their names")
    return {
        name: LoadedTensor(name, tensor)
        for name, tensor in tensors.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def check_index(index: Path) -> Mapping[str, str]:
    """Which file has each tensor, as ``index`` says. ValueError for what is no index, and for files
    elsewhere than in its folder or below."""
    try:
        listed = _weight_map(read_json(index, largest=_LARGEST_INDEX))
    except ValueError as error:
        raise ValueError(
            f"{index} is no index of a checkpoint: {printable(str(error))}; download it or save "
            "the checkpoint anew"
        ) from None
    for file in dict.fromkeys(listed.values()):
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\0" in file or not path.parts:
            raise ValueError(
                f"{index} names the file {printable(repr(file))}, expected one in its own folder; "
                "download it or save the checkpoint anew"
            )
    return listed


def _weight_map(content: Any) -> dict[str, str]:
    known = content if isinstance(content, dict) else {}
    found = known.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ValueError("it has no weight_map")
    if not isinstance(known.get("metadata"), dict):  # which transformers fills
        raise ValueError("it has no metadata")
    return found


def _check_index(files: Sequence[str], found: Mapping[str, Stored]) -> None:
    """ValueError where an index names tensors that its files do not have."""
    folder = Path(files[0]).parent
    for index in sorted(folder.glob("*.index.json")):
        listed = check_index(index)
        names = {Path(file).name for file in files}
        if set(listed.values()) != names:
            continue  # of other files
        if missing := [name for name in listed if name not in found]:
            named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
            raise ValueError(
                f"{index} names {len(missing)} tensors that its files do not have "
                f"({printable(named)}); download them or save the checkpoint anew"
            )
