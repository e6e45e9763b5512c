# SPDX-License-Identifier: Apache-2.0
"""Recorded arguments into a configuration dictionary; the core finds the conflicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed_autotp import _core
from deepspeed_autotp.config.loader import precision_switches
from deepspeed_autotp.config.recorded_args import Recorded
from deepspeed_autotp.config.validation import ConfigProblems, shown, wrong

_WHERE = "tensor_parallel"


def copied(value: Any) -> Any:
    """Dictionaries and lists anew, everything in them (process groups, mpu) the same object."""
    if isinstance(value, Mapping):
        return {key: copied(held) for key, held in value.items()}
    return [copied(held) for held in value] if isinstance(value, list) else value


def group_size(tp_group: Any, dist_module: Any, where: str) -> int:
    """Ranks of a group; 0 when there is no group, or nobody to ask.

    ValueError starting with ``where`` for what is no group, or not one of this rank.
    """
    if tp_group is None or dist_module is None:
        return 0
    try:
        size = int(dist_module.get_world_size(group=tp_group))
    except Exception as error:  # each library has its own way to say that it is no group
        raise ValueError(f"{where}: {wrong(tp_group, 'a process group')} ({error})") from None
    if size < 1:
        raise ValueError(f"{where}: this rank is not in the group; pass the group it belongs to")
    return size


def merge(
    config: dict[str, Any],
    recorded: Recorded | None,
    *,
    mpu: Any,
    mesh_param: Any,
    dist_module: Any,
) -> bool:
    """Fill ``config`` from the record; whether groups are still to be made.

    ValueError lists every conflict with both values and where each came from, and then
    ``config`` is unchanged.
    """
    section = _section(config, _WHERE, _WHERE)
    spelling = "tensor_parallel" if "tensor_parallel" in section else "tp"
    where = f"{_WHERE}.{spelling}"
    nested = _section(section, spelling, where)
    dtype = section.get("dtype")
    bf16, fp16 = precision_switches(config)
    fill = _core.merge(
        None if recorded is None else recorded.values,
        autotp_size=_size(section, "autotp_size", _WHERE),
        tp_size=_size(nested, "tp_size", where),
        tp_group=0 if nested.get("tp_group") is None else id(nested["tp_group"]),
        tp_group_size=group_size(nested.get("tp_group"), dist_module, f"{where}.tp_group"),
        section=spelling,
        dtype=None if dtype in (None, "auto") else str(dtype),
        bf16=bf16,
        fp16=fp16,
        has_mpu=mpu is not None,
        has_mesh=mesh_param is not None,
    )
    if fill["autotp_size"] is not None:
        section["autotp_size"] = fill["autotp_size"]
    if fill["tp_size"] is not None:
        nested["tp_size"] = fill["tp_size"]
    if fill["tp_group"] and recorded is not None:
        nested["tp_group"] = recorded.tp_group
    if nested:
        section[spelling] = nested
    if section:
        config[_WHERE] = section
    return bool(fill["make_groups"])


def _section(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    section = config.get(key)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ConfigProblems(where, [f": got {shown(section)}, expected a dictionary"])
    return section


def _size(section: Mapping[str, Any], key: str, where: str) -> int:
    value = section.get(key)
    if value is None or value == "auto":
        return -1
    if type(value) is not int or value < 0:
        raise ConfigProblems(where, [f"{key}: got {shown(value)}, expected a number of ranks"])
    return value
