# SPDX-License-Identifier: Apache-2.0
"""Our functions in the place of DeepSpeed's, for code that calls DeepSpeed by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from torch import Tensor, nn

from deepspeed_autotp.api.deepspeed_api import initialize, tp_model_init
from deepspeed_autotp.checkpoint.full_state import rank0_state_dict
from deepspeed_autotp.checkpoint.gather_params import gather_params
from deepspeed_autotp.checkpoint.iter_full_parameters import iter_full_parameters
from deepspeed_autotp.interop.accelerate import forget_loaders, give_full_state, watch_loaders
from deepspeed_autotp.interop.accelerate_replicas import see_replicas
from deepspeed_autotp.interop.deepspeed.module import is_engine
from deepspeed_autotp.interop.deepspeed.parameters import copy_zero_status
from deepspeed_autotp.interop.deepspeed.replace_functions import (
    install_functions,
    uninstall_functions,
)
from deepspeed_autotp.interop.replaced import Replaced
from deepspeed_autotp.interop.trainer_replicas import see_replicas_in_trainer
from deepspeed_autotp.interop.trl_models import follow_with_shards
from deepspeed_autotp.interop.trl_options import refuse_options
from deepspeed_autotp.interop.trl_vllm import send_full_weights
from deepspeed_autotp.interop.zero3_loading import load_under_zero3
from deepspeed_autotp.state.sharded_model import find_nested_tensor_parallel, owner_of

_REPLACED = Replaced()  # in this process, as what it replaces is


def install() -> None:
    """From now on ``deepspeed.initialize`` and ``deepspeed.tp_model_init`` are ours.

    transformers, Accelerate and TRL look both up when they call them. Where a DeepSpeed
    configuration has a TP size, Accelerate and transformers' Trainer see data-parallel replicas
    where they would see ranks: what they gather, reduce, count and report is what it is without
    tensor parallelism. Calling it twice is harmless. ImportError where DeepSpeed is missing. The
    self-check of a model whose inputs are not known takes a batch of the data that Accelerate has
    prepared last.
    """
    install_functions({"initialize": initialize, "tp_model_init": tp_model_init})
    watch_loaders()
    if _REPLACED or importlib.util.find_spec("accelerate") is None:
        return
    try:
        _see_replicas()
    except BaseException:  # as of a version that has not what is replaced
        uninstall()
        raise


def _see_replicas() -> None:
    see_replicas(_REPLACED)
    give_full_state(_REPLACED, _full_state)
    if importlib.util.find_spec("transformers") is not None:
        see_replicas_in_trainer(_REPLACED, configured=_configured)
        load_under_zero3(_REPLACED)


def _configured(arguments: object, tp_size: int) -> None:
    """What a Trainer with these arguments needs of TRL; ValueError for what cannot be right."""
    if tp_size > 1:
        refuse_options(arguments, tp_size=tp_size)
    send_full_weights(_REPLACED, _full_parameters)
    follow_with_shards(_REPLACED, _full_parameter)


def _full_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The full weights, on rank 0 of the run, of a sharded model; None for another one, and for an
    engine, which has a way of its own."""
    if is_engine(model) or find_nested_tensor_parallel(model) is None:
        return None
    return rank0_state_dict(model, frozen=True) or {}


def uninstall() -> None:
    """Put back what ``install`` has replaced; harmless where it has not."""
    uninstall_functions()
    forget_loaders()
    _REPLACED.restore()


def _full_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]] | None:
    """Those of a sharded model; None for another one."""
    return None if find_nested_tensor_parallel(model) is None else iter_full_parameters(model)


def _full_parameter(parameter: Tensor) -> Tensor | None:
    """A copy of the full tensor of one of a sharded model; None for another one."""
    if owner_of(parameter) is None:
        return None
    with gather_params(parameter):
        full = parameter.detach().clone()
        copy_zero_status(full, parameter)
        return full
