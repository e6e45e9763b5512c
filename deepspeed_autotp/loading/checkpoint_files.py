# SPDX-License-Identifier: Apache-2.0
"""The stored tensors of a checkpoint of one file or of several."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from deepspeed_autotp.loading.safetensors_header import stored_tensors
from deepspeed_autotp.loading.stored_tensor import LoadedTensor, Stored

_SAFETENSORS = ".safetensors"
_NAMED = 3


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
                raise ValueError(f"{name} is in {file} and in another file of the checkpoint")
            found[name] = tensor
    if len(files) > 1:
        _check_index(files, found)
    return found


def _pickled(
    file: str, load_pickled: Callable[[str], Mapping[str, Tensor]]
) -> dict[str, LoadedTensor]:
    try:
        tensors = load_pickled(file)
    except Exception as error:  # whatever torch.load raises for what it cannot read
        raise ValueError(f"{file} cannot be loaded: {error}") from None
    return {
        name: LoadedTensor(name, tensor)
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    }


def _check_index(files: Sequence[str], found: Mapping[str, Stored]) -> None:
    """ValueError where an index names tensors that its files do not have."""
    folder = Path(files[0]).parent
    for index in sorted(folder.glob("*.index.json")):
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{index} is no index of a checkpoint: it has no weight_map") from None
        names = {Path(file).name for file in files}
        if set(listed.values()) != names:
            continue  # of other files
        if missing := [name for name in listed if name not in found]:
            named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
            raise ValueError(
                f"{index} names {len(missing)} tensors that its files do not have ({named}); "
                "download them or save the checkpoint anew"
            )
