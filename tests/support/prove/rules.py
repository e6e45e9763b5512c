# SPDX-License-Identifier: Apache-2.0
"""Rules of the user's own: those that are right for a case, and some drawn by chance."""

import random
import re
from typing import Any

from torch import nn

from tests.support.prove.case import Case
from tests.support.prove.names import NAMES, NETWORK_NAMES


def own_rules(case: Case) -> list[dict[str, Any]] | None:
    """What a user would write who knows the model; None where that is not known."""
    attention, network = _attention(case), _network(case)
    if attention is None or network is None:
        return None
    return [*attention, *network]


def apart_rules(model: nn.Module) -> list[dict[str, Any]]:
    """Individually sharded layers of a block, with full activations between them."""
    names = sorted(
        {
            n.rpartition(".")[2]
            for n, m in model.named_modules()
            if type(m) is nn.Linear and "." in n
        }
    )
    names = [name for name in names if not name.isdigit()]
    return [_rule(tuple(names), "column", gather_output=True)] if names else []


def _rule(names: tuple[str, ...], kind: str, **more: Any) -> dict[str, Any]:
    pattern = rf".*\.({'|'.join(names)})\.(weight|bias)$"
    return {"patterns": [pattern], "partition_type": kind, **more}


def _attention(case: Case) -> list[dict[str, Any]] | None:
    q, k, v, out, fused, pair = NAMES[case.names]
    heads, groups, size = case.heads, case.groups or case.heads, case.head_size
    queries, keys = heads * size, groups * size
    if case.projection == "none":
        return []
    features = (case.before_output, case.per_head, case.head_norm, case.convolution, case.linear)
    if any(features) or case.positions in ("alibi", "table"):
        return None
    row = _rule((out,), "row")
    if case.projection == "separate":
        return [row, _rule((q, k, v), "column")]
    if case.projection == "qkv":
        return [row, _rule((fused,), "column", shape=[[queries, keys, keys], -1])]
    if case.projection == "vqk":
        return [row, _rule((fused,), "column", shape=[[keys, queries, keys], -1])]
    if case.projection == "q, kv":
        return [row, _rule((q,), "column"), _rule((pair,), "column", shape=[2, -1])]
    return None


def _network(case: Case) -> list[dict[str, Any]] | None:
    gate, up, down, fused = NETWORK_NAMES[case.network_names]
    if case.network == "none":
        return []
    if case.experts or case.inner_norm or case.shared or case.per_feature or case.linear:
        return None
    row = _rule((down,), "row")
    if case.network in ("plain", "two inputs"):
        return [row, _rule((up,), "column")]
    if case.network == "gated":
        return [row, _rule((up, gate), "column")]
    if case.network in ("gate|up", "up|gate"):
        return [row, _rule((fused,), "column", shape=[2, -1])]
    return None


def random_rules(case: Case, model: nn.Module) -> list[dict[str, Any]]:
    """For some weights, mostly wrong: they have to be refused, or to be right."""
    source = random.Random(case.seed + 1)
    shown = [(re.sub(r"\.\d+\.", r".*.", n), p.dim()) for n, p in model.named_parameters()]
    names = sorted({name for name, dims in shown if dims > 1 or source.random() < 0.05})
    rules = []
    for name in source.sample(names, min(len(names), source.randint(1, 6))):
        pattern = re.escape(name).replace(r"\.\*\.", r"\.\d+\.")
        rule: dict[str, Any] = {"patterns": [f"{pattern}$"]}
        rule["partition_type"] = source.choice(("column", "column", "row", "row", "skip"))
        if source.random() < 0.2:
            rule["shape"] = source.choice(([2, -1], [3, -1], [-1, 2]))
        if rule["partition_type"] == "column" and source.random() < 0.4:
            rule["gather_output"] = True
        if rule["partition_type"] == "skip" and source.random() < 0.5:
            rule["grad_allreduce"] = True
        if "shape" not in rule and source.random() < 0.15:
            rule["partition_dim"] = source.choice((0, 1))
        rules.append(rule)
    return rules
