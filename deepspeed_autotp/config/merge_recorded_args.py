# SPDX-License-Identifier: Apache-2.0
"""Recorded arguments into a configuration dictionary; the core finds the conflicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed_autotp import _core
from deepspeed_autotp.config.load_config import precision_switches
from deepspeed_autotp.config.recorded_args import Recorded
from deepspeed_autotp.config.tp_size import group_size, stated_size
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.config.validation import ConfigProblems, wrong

_WHERE = "tensor_parallel"


def copied(value: Any) -> Any:
    """Dictionaries and lists anew, everything in them (process groups, mpu) the same object."""
    if isinstance(value, Mapping):
        return {key: copied(held) for key, held in value.items()}
    return [copied(held) for held in value] if isinstance(value, list) else value


def compare(
    config: dict[str, Any],
    recorded: Recorded | None,
    *,
    mpu: Any,
    mesh_param: Any,
    dist_module: Any,
) -> dict[str, Any]:
    """What the record has to fill in, as the core's ``merge`` returns it.

    ValueError lists every conflict with both values and where each came from.
    """
    section, spelling, nested = _sections(config)
    where = f"{_WHERE}.{spelling}"
    tp_group, dtype = nested.get("tp_group"), section.get("dtype")
    bf16, fp16 = precision_switches(config)
    return _core.merge(
        None if recorded is None else recorded.values,
        autotp_size=stated_size(section, "autotp_size", _WHERE),
        tp_size=stated_size(nested, "tp_size", where),
        tp_group=0 if tp_group is None else id(tp_group),
        tp_group_size=group_size(tp_group, dist_module, f"{where}.tp_group"),
        section=spelling,
        dtype=None if dtype in (None, "auto") else str(dtype),
        bf16=bf16,
        fp16=fp16,
        has_mpu=mpu is not None,
        has_mesh=mesh_param is not None,
    )


def fill_dictionary(config: dict[str, Any], fill: Mapping[str, Any], recorded: Recorded) -> None:
    """Write what :func:`compare` found to be missing into ``config``."""
    section, spelling, nested = _sections(config)
    if fill["autotp_size"] is not None:
        section["autotp_size"] = fill["autotp_size"]
    section[spelling] = nested | _nested_values(fill, recorded)
    config[_WHERE] = section


def fill_settings(
    settings: TPTrainingConfig, fill: Mapping[str, Any], recorded: Recorded
) -> TPTrainingConfig:
    """``settings`` with what :func:`compare` found to be missing."""
    size = settings.autotp_size if fill["autotp_size"] is None else fill["autotp_size"]
    nested = settings.tensor_parallel.model_copy(update=_nested_values(fill, recorded))
    return settings.model_copy(update={"autotp_size": size, "tensor_parallel": nested})


def _nested_values(fill: Mapping[str, Any], recorded: Recorded) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if fill["tp_size"] is not None:
        values["tp_size"] = fill["tp_size"]
    if fill["tp_group"]:
        values["tp_group"] = recorded.tp_group
    return values


def _sections(config: Mapping[str, Any]) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """The section, the spelling of its nested section, and that."""
    section = _section(config, _WHERE, _WHERE)
    spelling = "tensor_parallel" if "tensor_parallel" in section else "tp"
    return section, spelling, _section(section, spelling, f"{_WHERE}.{spelling}")


def _section(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    section = config.get(key)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigProblems(where, [f": {wrong(section, 'a dictionary')}"])
    return dict(section)
