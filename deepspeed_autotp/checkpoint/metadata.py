# SPDX-License-Identifier: Apache-2.0
"""A file in each of DeepSpeed's checkpoints that says how its weights are sharded.

It is read before loading. A rank loads the file of its own TP rank. Sharded otherwise, the weights
would not fit, or would fit and be the wrong ones, as with a fused weight under another ``shape``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from deepspeed_autotp._core import Plan
from deepspeed_autotp.checkpoint.atomic_folder import write_atomically

_NAME = "tensor_parallel.json"
# Of what the hash of a layout covers, and how.
_VERSION = 2


def write_metadata(folder: Path, plan: Plan) -> None:
    """Write the metadata of ``plan`` into ``folder``, which is made where it is missing.

    After a crash the file has what it had before, or this.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"version": _VERSION, "ranks": plan.ranks, "layout": plan.layout_hash}
    write_atomically(Path(folder, _NAME), json.dumps(metadata).encode())


def check_metadata(folder: Path, plan: Plan, *, rank: int) -> None:
    """ValueError where the weights in ``folder`` are sharded otherwise than by ``plan``.

    Without metadata, as in a checkpoint of full weights or of DeepSpeed's own sharding, it is
    known only whether there are weights for ``rank``.
    """
    try:
        metadata = json.loads(Path(folder, _NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        _check_weights(folder, rank=rank)
        return
    version = metadata.get("version", 1)
    if version not in (1, _VERSION):
        raise ValueError(
            f"the checkpoint {str(folder)!r} has metadata of version {version}, expected at most "
            f"{_VERSION}; load it with the version of deepspeed-autotp that saved it, or load full "
            "weights, as save_16bit_model writes them, before the model is sharded"
        )
    if metadata["ranks"] != plan.ranks:
        raise ValueError(
            f"the checkpoint {str(folder)!r} was saved at TP size {metadata['ranks']}, but the TP "
            f"size of this model is {plan.ranks}; load it with autotp_size {metadata['ranks']}, or "
            "load full weights, as save_16bit_model writes them, before the model is sharded"
        )
    if metadata["layout"] != (plan.layout_hash if version == _VERSION else _first_hash(plan)):
        raise ValueError(
            f"the checkpoint {str(folder)!r} holds weights that were sharded by other rules; load "
            "it into the same model with the same tensor_parallel section, or load full weights, "
            "as save_16bit_model writes them, before the model is sharded"
        )


def _check_weights(folder: Path, *, rank: int) -> None:
    if any(folder.glob("*mp_rank_*")) and not any(folder.glob(f"*mp_rank_{rank:02d}_*")):
        raise ValueError(
            f"the checkpoint {str(folder)!r} holds no weights for TP rank {rank}: it was saved at "
            "a smaller TP size, or unsharded; load it with that autotp_size, or load full weights "
            "before the model is sharded"
        )


def _first_hash(plan: Plan) -> str:
    """The hash of a layout in metadata without a version."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in plan.entries:
        runs = [entry.runs(rank) for rank in range(plan.ranks)]
        digest.update(f"{entry.name} {list(entry.shape)} {entry.view} {runs}\n".encode())
    return digest.hexdigest()
