# SPDX-License-Identifier: Apache-2.0
"""The warning about a plan in which nearly everything is replicated."""

import json
import re

from deepspeed_autotp._core import Model, Plan, Rules
from tests.support.core_llama import llama, preset


def mostly_replicated(*, ranks: int) -> Plan:
    """Only the output head is sharded."""
    replicated = ["model.embed_tokens", "model.layers.*"]
    return Plan(llama(tied=False), preset(), ranks=ranks, replicated=replicated)


def test_the_largest_replicated_blocks_are_named() -> None:
    remark = mostly_replicated(ranks=2).replicated_warning()
    assert remark is not None
    assert remark.startswith("a rank holds 0.9")
    named = re.findall(r"([\w.*]+) \(0\.\d\d\)", remark)
    assert len(named) == 3
    assert set(named) == {f"model.layers.*.mlp.{x}_proj.weight" for x in ("gate", "up", "down")}


def test_the_rule_to_write_is_json_whose_pattern_matches_the_largest() -> None:
    plan = mostly_replicated(ranks=2)
    remark = plan.replicated_warning()
    assert remark is not None
    written = re.search(r"\{.*?\}", remark)
    assert written is not None
    spec = json.loads(written[0])
    matched = {e.name for e in plan.entries for p in spec["patterns"] if re.match(p, e.name)}
    assert matched == {f"model.layers.{i}.mlp.gate_proj.weight" for i in range(3)}
    assert spec["partition_type"] == "column"


def test_nothing_is_said_where_a_rank_gains_or_is_alone() -> None:
    assert Plan(llama(), preset(), ranks=2).replicated_warning() is None
    assert mostly_replicated(ranks=1).replicated_warning() is None


def test_letters_of_other_alphabets_stand_for_themselves_in_the_rule() -> None:
    modules = [
        ("", "Net", "other", {}),
        ("größe", "Linear", "linear", {}),
        ("up", "Linear", "linear", {}),
    ]
    parameters = [
        ("größe.weight", "weight", 1, (64, 64), "float32", 4, -1),
        ("up.weight", "weight", 2, (4, 4), "float32", 4, -1),
    ]
    rules = Rules()
    rules.add(["up"], {"partition_type": "column"}, label="a")
    warning = Plan(Model(modules, parameters), rules, ranks=2).replicated_warning()
    assert warning is not None
    written = re.search(r"\{.*?\}", warning)
    assert written is not None
    (pattern,) = json.loads(written[0])["patterns"]
    assert re.match(pattern, "größe.weight")
