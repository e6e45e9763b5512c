# SPDX-License-Identifier: Apache-2.0
"""The options of ``autotp plan`` and what their words mean."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = ("", "k", "m", "g", "t")
# Keys of a configuration that change the memory of a rank, and are not counted.
_LEFT_OUT = (
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "zero_optimization.round_robin_gradients",
    "data_types.grad_accum_dtype",
    "torch_autocast.enabled",
    "activation_checkpointing.cpu_checkpointing",
)
_MOST_BYTES = 10**18
_MOST_TOKENS = 2**31 - 1  # which kernels of torch can index
_ZERO_KEYS = {
    "reduce_bucket_size": "reduce_bucket",
    "stage3_param_persistence_threshold": "persistence",
    "stage3_max_live_parameters": "max_live",
    "sub_group_size": "sub_group",
    "overlap_comm": "overlap_comm",
}


def add_estimate_options(command: argparse.ArgumentParser) -> None:
    """Add what an estimate is for."""
    group = command.add_argument_group("estimate")
    group.add_argument("--dp", type=int, metavar="M", help="data-parallel ranks (default 1)")
    group.add_argument(
        "--zero", type=int, metavar="S", help="ZeRO stage (default: of the configuration, or 0)"
    )
    group.add_argument("--seq", type=int, metavar="L", help="tokens of a sequence: trace a step")
    group.add_argument(
        "--micro-batch", type=int, metavar="B", help="sequences of a step and rank (default 1)"
    )
    group.add_argument("--optimizer", help="such as adamw, sgd or lion (default adamw)")
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="run blocks again in the backward"
    )
    group.add_argument(
        "--lora", metavar="r=16", help="train LoRA: r=16,target_modules=q_proj+v_proj"
    )
    group.add_argument(
        "--bandwidth", metavar="450GB/s", help="that a GPU sends with: times of collectives"
    )
    group.add_argument(
        "--suggest", action="store_true", help="list the layouts of --gpus that fit --gpu-memory"
    )
    group.add_argument("--gpus", type=int, metavar="N", help="GPUs, with --suggest")
    group.add_argument("--gpu-memory", metavar="80GiB", help="memory of a GPU, with --suggest")


def check_positive(asked: argparse.Namespace) -> None:
    """ValueError for a size below 1, and for options that need another one."""
    for name in ("dp", "seq", "micro_batch", "gpus"):
        value = vars(asked)[name]
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected 1 or more")
    if asked.micro_batch is not None and asked.seq is None:
        raise ValueError("--micro-batch: got no --seq beside it, expected the tokens of a sequence")
    tokens = (asked.seq or 0) * (asked.micro_batch or 1)
    if tokens > _MOST_TOKENS:
        raise ValueError(
            f"--seq: got {tokens} tokens of a micro-batch, expected at most {_MOST_TOKENS}"
        )
    if asked.zero is not None and asked.zero not in range(4):
        raise ValueError(f"--zero: got {asked.zero}, expected 0 to 3")


def bytes_of(text: str, option: str) -> int:
    """``80GiB`` -> 80 * 2**30, ``80GB`` -> 80 * 10**9. ValueError for another form."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or not 0 < float(found[1]) < _MOST_BYTES or found[0][-1].isdigit():
        raise ValueError(f"{option}: got {text!r}, expected a size such as 80GiB or 80GB")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** _POWERS.index(found[2].lower()))


def bandwidth_of(text: str) -> float:
    """Bytes per second: ``450GB/s``. ValueError for another form, also for bits."""
    size = text.strip().removesuffix("/s")
    if size == text.strip() or size.endswith("b"):
        raise ValueError(
            f"--bandwidth: got {text!r}, expected bytes per second, such as 450GB/s or 25GB/s"
        )
    return float(bytes_of(size, "--bandwidth"))


def lora_of(text: str | None) -> dict[str, Any] | None:
    """Arguments of LoraConfig. ``r=16,target_modules=q_proj+v_proj``; PEFT's own modules for the
    model type where none are named. ValueError for another form."""
    if text is None:
        return None
    values: dict[str, Any] = {}
    for each in text.split(","):
        key, sign, value = each.partition("=")
        if key == "r" and sign and value.isdigit() and int(value) > 0:
            values["r"] = int(value)
        elif key == "target_modules" and value:
            values["target_modules"] = value if value == "all-linear" else value.split("+")
        else:
            raise ValueError(
                f"--lora: got {each!r}, expected r=16, or r=16,target_modules=q_proj+v_proj, or "
                "r=16,target_modules=all-linear"
            )
    if "r" not in values:
        raise ValueError(f"--lora: got {text!r} without r, expected r=16 or the like")
    return values


def zero_options(config: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Stage and sizes of the section zero_optimization, as the core names them. ValueError for a
    number that is none of them."""
    section = config.get("zero_optimization")
    given = section if isinstance(section, Mapping) else {}
    stage = given.get("stage", 0)
    found: dict[str, Any] = {}
    for key, name in _ZERO_KEYS.items():
        value = given.get(key)
        if isinstance(value, bool) or (isinstance(value, (int, float)) and name != "overlap_comm"):
            found[name] = value if isinstance(value, bool) else _size(key, value)
    if isinstance(stage, int) and stage not in range(4):
        raise _wrong("zero_optimization.stage", stage, "0 to 3")
    return stage if isinstance(stage, int) else 0, found


def optimizer_of(config: Mapping[str, Any]) -> str:
    """The type of the section optimizer, or a default."""
    section = config.get("optimizer")
    if section is not None and not isinstance(section, Mapping):
        raise _wrong("optimizer", section, "a dictionary")
    return str((section or {}).get("type", "adamw"))


def _size(key: str, value: int | float) -> int:
    if not -_MOST_BYTES < value < _MOST_BYTES:  # no NaN either
        raise _wrong(f"zero_optimization.{key}", value, "a number of elements")
    return int(value)


def _wrong(key: str, value: object, expected: str) -> ValueError:
    from deepspeed_autotp.config.validation import wrong

    return ValueError(f"{key}: {wrong(value, expected)}")


def accumulates(config: Mapping[str, Any]) -> bool:
    """Whether a step of this configuration has several micro-batches."""
    steps = config.get("gradient_accumulation_steps")
    return isinstance(steps, int) and steps > 1


def left_out(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of the configuration that change the memory of a rank, and are not counted."""
    found = []
    for key in _LEFT_OUT:
        section, _, name = key.partition(".")
        given = config.get(section)
        value = given.get(name) if isinstance(given, Mapping) else None
        is_set = value.get("device") != "none" if isinstance(value, Mapping) else bool(value)
        if is_set:
            found.append(key)
    return tuple(found)
