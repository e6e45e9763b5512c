# SPDX-License-Identifier: Apache-2.0
"""A note in each of DeepSpeed's checkpoints of how its weights are cut, read before loading.

A rank loads the file of its own number. Cut otherwise, its weights would not fit, or would fit
and be the wrong ones, as with a fused weight under another ``shape``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from deepspeed_autotp._core import Plan

_NAME = "tensor_parallel.json"


def write_note(folder: Path, plan: Plan) -> None:
    """Leave the note of ``plan`` in ``folder``, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    note = {"ranks": plan.ranks, "layout": _layout(plan)}
    Path(folder, _NAME).write_text(json.dumps(note), encoding="utf-8")


def check_note(folder: Path, plan: Plan, *, rank: int) -> None:
    """ValueError where the weights in ``folder`` are cut otherwise than by ``plan``.

    Without a note, as in a checkpoint of whole weights or of DeepSpeed's own sharding, it is known
    only whether there are weights for ``rank``.
    """
    try:
        note = json.loads(Path(folder, _NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        _check_weights(folder, rank=rank)
        return
    if note["ranks"] != plan.ranks:
        raise ValueError(
            f"the checkpoint {str(folder)!r} was saved by models of {note['ranks']} ranks, and "
            f"this model has {plan.ranks}; load it with autotp_size {note['ranks']}, or load whole "
            "weights, as save_16bit_model writes them, before the model is sharded"
        )
    if note["layout"] != _layout(plan):
        raise ValueError(
            f"the checkpoint {str(folder)!r} holds weights that were cut by other rules; load it "
            "into the same model with the same tensor_parallel section, or load whole weights, as "
            "save_16bit_model writes them, before the model is sharded"
        )


def _check_weights(folder: Path, *, rank: int) -> None:
    if any(folder.glob("*mp_rank_*")) and not any(folder.glob(f"*mp_rank_{rank:02d}_*")):
        raise ValueError(
            f"the checkpoint {str(folder)!r} holds no weights for rank {rank} of a model: it was "
            "saved by fewer ranks, or by one; load it with that autotp_size, or load whole weights "
            "before the model is sharded"
        )


def _layout(plan: Plan) -> str:
    """A digest of what each rank holds of each parameter."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in plan.entries:
        runs = [entry.runs(rank) for rank in range(plan.ranks)]
        digest.update(f"{entry.name} {list(entry.shape)} {entry.view} {runs}\n".encode())
    return digest.hexdigest()
