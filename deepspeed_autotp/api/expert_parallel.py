# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's AutoEP (``expert_parallel``) beside tensor parallelism.

The engine replaces the blocks of experts of a model that is sharded already. So the plan leaves
their routers and experts as they are, and is made anew when the engine has replaced them: with the
new routers, which are replicated, and without the new experts, of which the ranks of a TP group
hold no shards but other ones each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp._core import index_pattern
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.config.validation import shown, wrong
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.interop.deepspeed.auto_ep import (
    AutoEPOptions,
    ExpertBlock,
    auto_ep_options,
    find_expert_blocks,
    starting_auto_ep,
    unknown_keys,
)
from deepspeed_autotp.sharding.weight_sync import sample_digest
from deepspeed_autotp.state.sharded_model import TensorParallel

_INSTEAD = (
    "or leave expert_parallel out, and give each TP rank some of the experts, whole, with "
    "tensor_parallel.expert_partition 'experts'"
)


def expert_blocks(
    model: nn.Module,
    checked: Any,
    settings: TPTrainingConfig,
    *,
    section: Any,
    optimizer: Any,
    before: TensorParallel | None,
) -> tuple[ExpertBlock, ...]:
    """The blocks of ``model`` that the engine is going to replace; none without AutoEP.

    ``checked`` is what DeepSpeed made of its configuration, ``section`` its expert_parallel, and
    ``before`` the state of a model that is sharded. ValueError for what would not be right beside
    it.
    """
    if before is not None and before.expert_blocks:
        raise ValueError(
            f"initialize: model: got a {type(model).__name__} with experts that DeepSpeed's AutoEP "
            "has split for an engine before, expected an unsharded model; build it anew, and load "
            "a checkpoint"
        )
    options = auto_ep_options(checked)
    _refuse_unread(section)
    if options is None:
        return ()
    if before is not None:
        raise ValueError(
            "expert_parallel: got a model that is sharded already, expected one that initialize "
            f"shards; call initialize with the unsharded model, {_INSTEAD}"
        )
    lines = [
        f"{key}: got {given} beside expert_parallel, expected {expected}"
        for key, given, expected in _beside(options, settings, optimizer)
    ]
    if lines:
        raise ValueError("\n".join([*lines, f"write what is expected, {_INSTEAD}"]))
    ranks = dist.get_world_size()
    try:
        found = find_expert_blocks(model, checked, tp_size=settings.autotp_size, ranks=ranks)
    except ValueError as error:
        raise ValueError(
            f"expert_parallel: DeepSpeed's AutoEP refuses it: {error}; {_INSTEAD}"
        ) from error
    if not found:
        raise ValueError(
            f"expert_parallel: got a {type(model).__name__}, in which DeepSpeed's AutoEP finds no "
            "blocks of experts, expected a mixture of experts; leave expert_parallel out"
        )
    if options.stage > 0 and not any(p.requires_grad for p in _experts_of(model, found)):
        raise ValueError(
            f"expert_parallel: got a {type(model).__name__} whose experts are all frozen with "
            f"zero_optimization.stage {options.stage}, expected some that train, of which "
            f"DeepSpeed's optimizer needs a group; use stage 0, {_INSTEAD}"
        )
    return found


def _experts_of(model: nn.Module, blocks: tuple[ExpertBlock, ...]) -> Iterator[Tensor]:
    for block in blocks:
        yield from model.get_submodule(f"{block.name}.{block.experts}").parameters()


def refuse_unlike_experts(
    model: nn.Module,
    blocks: tuple[ExpertBlock, ...],
    *,
    section: Any,
    tp_size: int,
    agreement: Agreement,
) -> None:
    """ValueError on every rank where experts are split over TP groups that have other weights of
    them: DeepSpeed sends each expert to its copies only. All ranks call it."""
    if not blocks or section["autoep_size"] <= tp_size:
        return
    experts = list(_experts_of(model, blocks))
    own = "" if any(p.is_meta for p in experts) else sample_digest(experts)
    if len(set(agreement.exchange(own)[::tp_size])) > 1:
        raise ValueError(
            f"expert_parallel: got TP groups with different weights of the experts of "
            f"{type(model).__name__}, expected the same, as some experts are those of one group "
            "and some of another; set the same seed on every rank before the model is built, or "
            "load the same weights"
        )


def _refuse_unread(section: Any) -> None:
    """ValueError for what DeepSpeed would pass over in the section, or read as something else."""
    if not isinstance(section, Mapping):
        return
    lines = [
        f"expert_parallel: got the unknown key {key!r}, expected those of DeepSpeed's AutoEP"
        + (f"; near ones are {', '.join(near)}" if near else "")
        for key, near in unknown_keys(section).items()
    ]
    if not isinstance(section.get("enabled", False), bool):
        lines.append(f"expert_parallel.enabled: {wrong(section['enabled'], 'true or false')}")
    if lines:
        raise ValueError("\n".join(lines))


def _beside(
    options: AutoEPOptions, settings: TPTrainingConfig, optimizer: Any
) -> Iterator[tuple[str, str, str]]:
    """Key, value and what is expected, of what does not go with AutoEP."""
    if settings.sequence_parallel:
        yield "tensor_parallel.sequence_parallel", "true", "false, as AutoEP is given all tokens"
    if settings.expert_partition != "width":
        yield "tensor_parallel.expert_partition", shown(settings.expert_partition), "no such key"
    if options.stage > 2:
        yield "zero_optimization.stage", str(options.stage), "0, 1 or 2"
    for key in options.false_keys:
        yield f"zero_optimization.{key}", "false", "true, which DeepSpeed needs for experts"
    if options.stage == 1 and options.wide_gradients:
        expected = "that of the weights: the gradient norm of DeepSpeed's BF16_Optimizer counts no "
        yield "data_types.grad_accum_dtype", "'fp32'", f"{expected}experts of other TP groups"
    if options.loads_universal:
        yield (
            "checkpoint.load_universal",
            "true",
            "false, as experts are in no universal checkpoint",
        )
    if options.comm_backend != "comm":
        yield "expert_parallel.comm_backend", shown(options.comm_backend), "'comm'"
    if options.score_apply == "pre":
        kept = "no such key: the experts of transformers are weighted after them"
        yield "expert_parallel.score_apply", "'pre'", kept
    if options.stage > 0 and isinstance(optimizer, torch.optim.Optimizer):
        made = "a section optimizer, of which DeepSpeed makes the groups of experts that it needs"
        yield "initialize: optimizer", f"an instance of {type(optimizer).__name__}", made


def replaced_modules(blocks: tuple[ExpertBlock, ...]) -> tuple[str, ...]:
    """The modules that AutoEP replaces, with ``*`` for each index."""
    names = [
        f"{index_pattern(block.name)}.{part}"
        for block in blocks
        for part in (block.router, block.experts)
    ]
    return tuple(dict.fromkeys(names))


def new_routers(blocks: tuple[ExpertBlock, ...]) -> tuple[str, ...]:
    """The modules that AutoEP has put into the places of routers, with ``*`` for each index."""
    return tuple(dict.fromkeys(f"{index_pattern(block.name)}.router" for block in blocks))


def replaceable(blocks: tuple[ExpertBlock, ...], parameters: Any) -> Any:
    """``parameters`` as lists, of which DeepSpeed follows those that AutoEP replaces: in a tuple or
    an iterator over one the routers and experts of before would stay, and the new ones not train.
    Groups have a name each, by which DeepSpeed makes those of their experts.
    """
    if not blocks or parameters is None or isinstance(parameters, (Tensor, Mapping)):
        return parameters
    groups = list(parameters)
    if not all(isinstance(each, Mapping) and "params" in each for each in groups):
        return groups
    return [
        {"name": f"group {index}", **each, "params": _listed(each["params"])}
        for index, each in enumerate(groups)
    ]


def _listed(parameters: Any) -> list[Any]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def starting(blocks: tuple[ExpertBlock, ...]) -> AbstractContextManager[None]:
    """A context in which DeepSpeed's engine can replace ``blocks``."""
    return starting_auto_ep() if blocks else nullcontext()
