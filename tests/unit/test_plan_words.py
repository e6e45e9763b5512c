# SPDX-License-Identifier: Apache-2.0
"""A plan in words, as it is logged and explained."""

import re

from deepspeed_autotp._core import Model, Plan, Rules
from deepspeed_autotp.planning.plan_words import decisions, explanation, report_line
from tests.support.core_llama import ROOT_MODULE, llama, preset


def test_the_line_counts_what_is_sharded_and_says_why_the_rest_is_not() -> None:
    plan = Plan(llama(tied=False), preset(), ranks=2, replicated=["model.layers.*.mlp"])
    line = report_line(plan, replicated=["model.layers.*.mlp"])
    full, local = (
        sum(4 * size for size in sizes)
        for sizes in (
            (_elements(e.shape) for e in plan.entries),
            (_elements(e.local_shape(0)) for e in plan.entries),
        )
    )
    sharded = sum(entry.is_sharded for entry in plan.entries)
    assert line.startswith(f"{sharded} parameters sharded over 2 ranks (")
    assert f"{sharded} by" in line or " by preset" in line
    assert "(differed in the self-check: model.layers.*.mlp." in line
    assert f"each rank holds {local / 1000:.1f} kB of {full / 1000:.1f} kB" in line
    assert f"({local / full:.3f} of the model)" in line


def test_ranks_that_hold_different_shares_are_said_as_a_range() -> None:
    line = report_line(Plan(llama(), preset(), ranks=3))
    found = re.search(r"each rank holds (\S+) kB to (\S+) kB of .* \((\S+) to (\S+) of", line)
    assert found is not None
    assert float(found[1]) < float(found[2]) and float(found[3]) < float(found[4])


def test_every_pattern_of_names_has_one_decision() -> None:
    plan = Plan(llama(), preset(), ranks=2, replicated=["model.layers.*.mlp"])
    lines = list(decisions(plan))
    assert len(lines) == len(plan.table())
    query = next(line for line in lines if ".q_proj.weight" in line)
    assert query.startswith("model.layers.*.self_attn.q_proj.weight x3: kind column; decided by pr")
    assert "rank 1 [32, 64], 32 to 63 of 64 along dim 0" in query
    assert "model.layers.0.self_attn.num_attention_heads 4, local [2, 2]" in query
    kept = next(line for line in lines if ".mlp.up_proj.weight" in line)
    assert "kind replicated; decided by" in kept
    assert "reason a rule or the self-check replicates it" in kept


def test_what_no_rule_shards_has_a_reason() -> None:
    modules = [ROOT_MODULE, ("norm", "RMSNorm", "other", {}), ("router", "Router", "other", {})]
    norm = ("norm.weight", "weight", 1, (64,), "float32", 4, -1)
    router = ("router.weight", "weight", 2, (8, 64), "float32", 4, -1)
    plan = Plan(Model(modules, [norm, router]), Rules(), ranks=2)
    assert [dict(explanation(plan, entry))["reason"] for entry in plan.entries] == [
        "a norm, bias or scale that belongs to no sharded layer",
        "no rule of the configuration, the model or a known block shards it",
    ]


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
