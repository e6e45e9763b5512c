# SPDX-License-Identifier: Apache-2.0
"""The TP size: what states it, whether the statements agree, and whether it fits the ranks.

The core compares the statements. The nested section is called ``tp`` here, its usual spelling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepspeed_autotp import _core
from deepspeed_autotp.config.section import is_auto
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.config.validation import ConfigProblems, shown, wrong

__all__ = [
    "check_engine_tp_size",
    "consecutive_ranks",
    "group_ranks",
    "group_size",
    "refuse_unfilled_auto",
    "settle_tp_size",
    "stated_size",
]

_NOT_STATED = -1


def stated_size(section: Mapping[str, Any], key: str, where: str) -> int:
    """A size in a section that is still a dictionary; -1 where it is left out or "auto"."""
    value = section.get(key)
    if value is None or is_auto(value):
        return _NOT_STATED
    if type(value) is not int or value < 0:
        raise ConfigProblems(where, [f"{key}: got {shown(value)}, expected a number of ranks"])
    return value


def group_ranks(tp_group: Any, dist_module: Any, where: str) -> int:
    """Ranks of a process group; 0 when there is no group, or no torch.distributed to ask, and -1
    where this rank is not in it. ValueError starting with ``where`` for what is no group."""
    if tp_group is None or dist_module is None:
        return 0
    try:
        size = int(dist_module.get_world_size(group=tp_group))
    except Exception as error:  # each library has its own way to say that it is no group
        raise ValueError(f"{where}: {wrong(tp_group, 'a process group')} ({error})") from None
    return size if size > 0 else -1


def group_size(tp_group: Any, dist_module: Any, where: str) -> int:
    """As :func:`group_ranks`, with a ValueError where this rank is not in the group."""
    size = group_ranks(tp_group, dist_module, where)
    if size < 0:
        raise ValueError(f"{where}: this rank is not in the group; pass the group it belongs to")
    return size


def settle_tp_size(
    settings: TPTrainingConfig,
    *,
    tp_size: object,
    group_ranks: int | None,
    ranks: int,
    called: str,
    group_key: str,
) -> int:
    """The TP size for the function ``called``; ``group_ranks`` is the size of its process group,
    which it calls ``group_key``."""
    if tp_size is not None and (type(tp_size) is not int or tp_size < 1):
        raise ValueError(f"{called}: tp_size: {wrong(tp_size, 'a number of ranks')}")
    nested = settings.tensor_parallel
    stated = {
        f"tp_size of {called}": tp_size,
        "the size of the TP group": group_ranks,
        "config.autotp_size": settings.autotp_size if _has(settings, "autotp_size") else None,
        "config.tp.tp_size": nested.tp_size if _has(nested, "tp_size") else None,
    }
    size = _core.settle_tp_size([(key, n) for key, n in stated.items() if isinstance(n, int)])
    if size is None:
        raise ValueError(
            f"{called}: no TP size is given; pass tp_size, {group_key}, mesh or config.autotp_size"
        )
    if group_ranks is None:
        _check_divides(size, ranks, f"{called}: the TP size")
    return size


def refuse_unfilled_auto(config: Mapping[str, Any]) -> None:
    """ValueError for an "auto" that ``tp_model_init`` has not filled."""
    if is_auto((config.get("tensor_parallel") or {}).get("autotp_size")):
        raise ValueError(
            "tensor_parallel.autotp_size: got 'auto', but tp_model_init recorded no TP size for "
            "this model; write the number of ranks, or 1 to leave the model unsharded"
        )


def check_engine_tp_size(
    settings: TPTrainingConfig,
    *,
    rank: int,
    ranks: int,
    sharded_over: Sequence[int] | None,
    engine_ranks: int | None,
    has_mpu: bool,
) -> None:
    """ValueError where DeepSpeed's engine cannot have this TP size.

    ``sharded_over`` are the ranks over which the model is sharded already, and ``engine_ranks`` is
    the size of the groups that DeepSpeed keeps for every engine of the process.
    """
    size, nested = settings.autotp_size, settings.tensor_parallel.tp_size
    where = f"tensor_parallel.autotp_size is {size}"
    if size == 0 and nested > 1:
        raise ValueError(
            f"tensor_parallel.tp.tp_size is {nested}, but autotp_size, which switches tensor "
            f"parallelism on, is not set; write autotp_size: {nested}"
        )
    needed = consecutive_ranks(size, rank)
    if sharded_over is not None and list(sharded_over) != needed:
        raise ValueError(
            f"{where}, for which DeepSpeed uses the ranks {needed}, but the model is sharded over "
            f"the ranks {list(sharded_over)} already; write autotp_size: {len(sharded_over)} and "
            "shard over consecutive ranks"
        )
    _check_divides(size, ranks, "tensor_parallel.autotp_size")
    is_unsharded = size <= 1
    if engine_ranks in (None, max(size, 1)) or (is_unsharded and has_mpu):
        return
    raise ValueError(
        f"{where}, but DeepSpeed has groups of {engine_ranks} ranks in this process already, from "
        f"an earlier engine, and can have one size only; write autotp_size: {engine_ranks} for "
        "this model, too, or initialize it in another process"
        + (", or before the sharded one" if is_unsharded else "")
    )


def consecutive_ranks(tp_size: int, rank: int) -> list[int]:
    """The ranks of the TP group of ``rank`` in DeepSpeed's engine."""
    size = max(tp_size, 1)
    first = rank // size * size
    return list(range(first, first + size))


def _check_divides(size: int, ranks: int, where: str) -> None:
    if size > 1 and ranks % size:
        fitting = [str(n) for n in range(1, ranks + 1) if ranks % n == 0]
        raise ValueError(
            f"{where} is {size}, which does not divide the {ranks} ranks of this run; "
            f"sizes that fit: {', '.join(fitting)}"
        )


def _has(section: Any, field: str) -> bool:
    return field in section.model_fields_set
