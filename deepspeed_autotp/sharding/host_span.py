# SPDX-License-Identifier: Apache-2.0
"""The warning where a TP group spans hosts: which ones, what it costs, and how to avoid it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepspeed_autotp.distributed.hosts import Host
from deepspeed_autotp.sharding.weight_location import RankReport

# How many ranks of a host, and how many hosts, the warning lists.
_NAMED = 4


def spanning_warning(reports: Sequence[RankReport], tp_size: int) -> str:
    """Empty where each TP group is within a host. ``reports`` are those of the ranks that agree,
    one TP group after the other."""
    groups = [reports[at : at + tp_size] for at in range(0, len(reports), tp_size)]
    spanning = [group for group in groups if len(_by_host(group)) > 1]
    if not spanning:
        return ""
    first, others = spanning[0], len(spanning) - 1
    more = f", and {others} more TP group{'s' if others > 1 else ''} alike" if others else ""
    return (
        f"a TP group of {tp_size} ranks spans hosts: {_listed(first)}{more}. The sums of every row "
        "layer in the forward pass, and of every column layer in the backward pass, go over the "
        f"network in each step. {_advice(reports, tp_size, len(groups))}"
    )


def _advice(reports: Sequence[RankReport], tp_size: int, groups: int) -> str:
    if groups == 1:
        return "Take a TP group whose ranks are on one host"
    counts = [len(ranks) for ranks in _by_host(reports).values()]
    if all(count % tp_size == 0 for count in counts):
        return (
            "Number the ranks of a host consecutively, as torchrun does, and srun with "
            "--distribution=block: TP groups are consecutive ranks"
        )
    least, most = min(counts), max(counts)
    have = f"{least} ranks" if least == most else f"{least} to {most} ranks"
    return f"Take a TP size that divides the ranks of each host, which has {have}"


def _by_host(reports: Sequence[RankReport]) -> Mapping[Host, list[int]]:
    found: dict[Host, list[int]] = {}
    for each in reports:
        found.setdefault(each.host, []).append(each.rank)
    return found


def _listed(reports: Sequence[RankReport]) -> str:
    by_host = _by_host(reports)
    parts = []
    for host, ranks in list(by_host.items())[:_NAMED]:
        named = ", ".join(str(rank) for rank in ranks[:_NAMED])
        dots = ", ..." if len(ranks) > _NAMED else ""
        parts.append(f"rank{'s' if len(ranks) > 1 else ''} {named}{dots} on {host}")
    hidden = len(by_host) - len(parts)
    return "; ".join(parts) + (f"; {hidden} more hosts" if hidden else "")
