# SPDX-License-Identifier: Apache-2.0
"""Options of DeepSpeed that are refused beside tensor parallelism; docs/options.md has them all.

Each would group other ranks than tensor parallelism does, change layers that are sharded, or is
of numbers that no test compares with those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deepspeed_autotp.config.validation import shown

_BOOL, _INT = TypeAdapter(bool), TypeAdapter(int)


def _is_on(value: object) -> bool:
    return _read(_BOOL, value) is True


def _is_several(value: object) -> bool:
    number = _read(_INT, value)
    return number is not None and number > 1


def _read(adapter: TypeAdapter[Any], value: object) -> Any:
    """As DeepSpeed reads it, also from text; None for what it refuses itself."""
    try:
        return adapter.validate_python(value)
    except ValidationError:
        return None


def _is_given(value: object) -> bool:
    return value is not None and value is not False and value != "auto"


@dataclass(frozen=True, slots=True)
class _Refused:
    """``key`` with dots between sections, refused where ``when`` says so of its value."""

    key: str
    when: Callable[[object], bool]
    why: str
    remedy: str = "leave it out"


_GROUPS = "DeepSpeed's engine makes groups of ranks for it without regard to those of a TP group"
_KERNELS = "no test compares its kernels, which need a GPU, with tensor parallelism"

_REFUSED = (
    _Refused(
        "sequence_parallel_size",
        _is_several,
        _GROUPS,
        "leave it out, or shard the tokens with tensor_parallel.sequence_parallel",
    ),
    _Refused("data_parallel_size", _is_given, _GROUPS),
    _Refused(
        "compile.deepcompile",
        _is_on,
        "it reduces gradients in a compiled graph, which no test compares with tensor parallelism",
        "leave it out, or use torch.compile",
    ),
    _Refused(
        "hybrid_engine.enabled",
        _is_on,
        "it replaces layers that are sharded by those of its inference kernels",
        "leave it out, and generate with the engine's module",
    ),
    _Refused(
        "data_efficiency.data_routing.random_ltd.enabled",
        _is_on,
        "each rank would draw the tokens that a layer drops for itself",
    ),
    _Refused(
        "data_efficiency.data_sampling.curriculum_learning.enabled",
        _is_on,
        "DeepSpeed's sampler sends the indices of a batch from rank 0, which is in the "
        "data-parallel group of one rank of a TP group only",
        "leave it out, and order the data set before",
    ),
    _Refused("autotuning.enabled", _is_on, "it counts every rank as a data-parallel one"),
    _Refused(
        "zero_optimization.zero_hpz_partition_size",
        _is_several,
        "DeepSpeed takes neighbouring ranks for it, which are those of a TP group",
    ),
    _Refused("zero_optimization.zero_quantized_weights", _is_on, _KERNELS),
    _Refused("zero_optimization.zero_quantized_nontrainable_weights", _is_on, _KERNELS),
    _Refused("zero_optimization.zero_quantized_gradients", _is_on, _KERNELS),
    _Refused(
        "zero_optimization.zenflow",
        _is_given,
        "its optimizers select gradients by their size, and their gradient norm is not known",
    ),
    _Refused(
        "zero_optimization.offload_optimizer.super_offload",
        _is_on,
        "the gradient norm of its optimizer is not known",
        "leave it out; offload_optimizer works without it",
    ),
    _Refused(
        "zero_optimization.legacy_stage1", _is_on, "DeepSpeed has removed it", "use stage 1 alone"
    ),
)


def refuse_options(config: Mapping[str, Any], *, mesh_param: object = None) -> None:
    """One ValueError for all options of ``config``, and of ``initialize``, that are refused."""
    lines = [
        f"{each.key}: got {shown(value)}, expected no such option: {each.why}; {each.remedy}"
        for each in _REFUSED
        if each.when(value := _value(config, each.key)) and not _is_off(config, each.key)
    ]
    if mesh_param is not None:
        lines.append(f"mesh_param: got {shown(mesh_param)}, expected None: {_GROUPS}; leave it out")
    if lines:
        raise ValueError("\n".join(["not supported beside tensor parallelism:", *lines]))


def _is_off(config: object, key: str) -> bool:
    """Whether a section around ``key`` is switched off."""
    sections = key.split(".")[:-1]
    for at in range(1, len(sections)):
        name = ".".join([*sections[:at], "enabled"])
        if _value(config, name) is not None and not _is_on(_value(config, name)):
            return True
    return False


def _value(config: object, key: str) -> object:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config
