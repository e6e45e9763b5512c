# SPDX-License-Identifier: Apache-2.0
"""What the optimizer has states for at another size, and which optimizers cannot be resharded."""

from __future__ import annotations

from typing import Any

from deepspeed_autotp.checkpoint.layout import Layout
from deepspeed_autotp.checkpoint.saved_checkpoint import SavedCheckpoint
from deepspeed_autotp.checkpoint.zero_partition import sub_groups


def group_settings(saved: SavedCheckpoint) -> list[dict[str, Any]]:
    """The settings of the optimizer's groups, of which ``params`` are indices of the old units.

    ValueError where the states are those of ``elastic_checkpoint``.
    """
    states = saved.optimizer(0, 0)
    base = states.get(saved.kind.base, states)
    if not isinstance(base, dict):
        raise ValueError(
            f"the checkpoint {str(saved.files.folder)!r} was saved with "
            "zero_optimization.elastic_checkpoint, whose states cannot be resharded; load it "
            "at the sizes it was saved at"
        )
    return [dict(group) for group in base["param_groups"]]


def refuse_other_orders(saved: SavedCheckpoint) -> None:
    """ValueError where the files order the elements of flat groups in another way."""
    if saved.kind.name not in ("zero", "bf16"):
        return
    states = saved.optimizer(0, 0)
    mapped = [
        {name: (at.start, at.numel) for name, at in group.items()}
        for group in states["param_slice_mappings"]
    ]
    expected = [
        {piece.name: (piece.start, piece.numel) for piece in partitions[0].pieces}
        for _, partitions in saved.units(0)
    ]
    paddings = states.get("param_alignment_paddings", [])
    if mapped != expected or any(any(group) for group in paddings):
        raise ValueError(
            f"the checkpoint {str(saved.files.folder)!r} has its optimizer in an order of its own, "
            "as round_robin_gradients and parameter_alignment make it; load it at the sizes it was "
            "saved at"
        )


def new_units(
    saved: SavedCheckpoint,
    layout: Layout,
    settings: list[dict[str, Any]],
    *,
    replicas: int,
    sub_group_size: int,
) -> tuple[tuple[str, ...], ...]:
    """The names of the new units: those of the old ones, or ZeRO 3's new sub-groups; ``params`` in
    ``settings`` become their indices. ValueError where TP ranks would have other sub-groups."""
    parameters = layout.parameters
    assert saved.groups is not None
    if not saved.kind.is_stage3:
        return saved.groups
    made: list[tuple[str, ...]] = []
    for group in settings:
        names = [name for unit in group["params"] for name in saved.groups[unit]]
        # Ranks whose shards differ in size have sub-groups of their own.
        new, *others = (
            sub_groups([(n, parameters[n].numel(r)) for n in names], replicas, sub_group_size)
            if names
            else []
            for r in range(layout.ranks)
        )
        if any(other != new for other in others):
            raise ValueError(
                "zero_optimization.sub_group_size cuts the parameters of each TP rank "
                "otherwise; set it to more elements than a rank has"
            )
        group["params"] = list(range(len(made), len(made) + len(new)))
        made += [tuple(each) for each in new]
    return tuple(made)
