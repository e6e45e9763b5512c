# SPDX-License-Identifier: Apache-2.0
"""From a configuration and a described model to a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from deepspeed_autotp._core import Kind, Plan, Rules, index_pattern
from deepspeed_autotp.config.autotp_config import AutoTPConfig, build_rules
from deepspeed_autotp.config.tp_section import TPSection
from deepspeed_autotp.planning.model_data import Plannable, Style


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan is asked for beside the rules.

    ``replicated`` names modules that stay replicated whatever the rules say, and ``individual``
    those whose layers are sharded one by one, with full activations between them. ``heuristics``
    says whether layers are sharded because of their names in a model of a type that was never
    tried, and ``large_layers`` whether large ones are sharded individually that nothing else
    shards; ``large_names`` names them, with ``*`` for each index, whatever they hold.
    ``gather_logits``: the output head keeps no shard of them. ``sequence_parallel``:
    ValueError, naming the module, where the model does not allow it; ``all_tokens`` names blocks
    that then need all tokens up to their end.
    """

    replicated: tuple[str, ...] = ()
    individual: tuple[str, ...] = ()
    heuristics: bool = True
    large_layers: bool = True
    large_names: tuple[str, ...] | None = None
    gather_logits: bool = False
    sequence_parallel: bool = False
    all_tokens: tuple[str, ...] = ()


_RULES_ALONE = PlanRequest()
_Settings = TypeVar("_Settings", bound=TPSection)
_WHOLE_EXPERTS = (Kind.WHOLE_EXPERTS, Kind.WHOLE_EXPERT_BLOCKS)


def make_plan(
    description: Plannable,
    settings: TPSection,
    *,
    ranks: int,
    request: PlanRequest = _RULES_ALONE,
    must_shard: bool = True,
) -> Plan:
    """The plan for ``ranks`` ranks; with ``must_shard`` ValueError when it shards nothing."""
    given = settings.get_partition_config_object()
    partition = given or AutoTPConfig()
    return Plan(
        description.model,
        _model_rules(description.styles) if given is None else build_rules(given),
        ranks=ranks,
        grain=settings.tensor_parallel.tp_grain_size,
        strict=partition.strict_mode,
        defaults=partition.use_default_specs,
        embedding_dim=partition.embedding_partition_dim,
        head_patterns=partition.lm_head_patterns,
        replicated=request.replicated,
        individual=request.individual,
        families=given is None,
        heuristics=request.heuristics,
        large_layers=request.large_layers,
        large_names=request.large_names,
        sequence_parallel=request.sequence_parallel,
        all_tokens=request.all_tokens,
        vocab_parallel_lm_head=False if request.gather_logits else settings.vocab_parallel_lm_head,
        expert_partition=settings.expert_partition,
        must_shard=must_shard,
    )


def skips_all(
    styles: Sequence[Style], describe: Callable[[], Plannable], settings: TPSection
) -> bool:
    """Whether the rules, or ``styles`` where there are none, skip parameters of a model and ask for
    nothing else, so that it is meant to stay as it is."""
    given = settings.get_partition_config_object()
    rules = _model_rules(styles) if given is None else build_rules(given)
    if not rules.only_skip or settings.sequence_parallel or settings.vocab_parallel_lm_head:
        return False
    try:
        ranks = settings.autotp_size
        return make_plan(describe(), settings, ranks=ranks, must_shard=False).skips_all
    except ValueError:  # said where the model is to be sharded
        return False


def _model_rules(styles: Sequence[Style]) -> Rules:
    rules = Rules()
    for pattern, style, required in styles:
        rules.add_style(pattern, style, required=required)
    return rules


def large_names(plan: Plan) -> tuple[str, ...]:
    names = (index_pattern(layer.module) for layer in plan.layers if layer.is_large)
    return tuple(dict.fromkeys(names))


def decided(settings: _Settings, plan: Plan) -> _Settings:
    """``settings`` for a smaller model that stands for that of ``plan``: what they leave open
    follows from sizes."""
    if settings.expert_partition != "auto":
        return settings
    whole = any(layer.kind in _WHOLE_EXPERTS for layer in plan.layers)
    return settings.model_copy(update={"expert_partition": "experts" if whole else "width"})
