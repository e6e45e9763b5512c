# SPDX-License-Identifier: Apache-2.0
"""What is printed of a model that is sharded, without any set-up of logging."""

import re

from tests.distributed.sharding_report_ranks import printed
from tests.support.worker_pool import Pool


def test_rank_0_prints_one_line(pool: Pool) -> None:
    first, second = pool.run(printed)
    assert second == []
    assert re.fullmatch(
        r"\[\S+ \S+\] \[INFO\] \[autotp\] LlamaForCausalLM: \d+ parameters sharded over 2 ranks "
        r"\(\d+ by tp_plan\); replicated \d.* \(norms and biases\), \S+ % of the model; each rank "
        r"holds .* of .* \(0\.\d+ of the model\); plan \S+ s, self-check \S+ s, shard \S+ s",
        "".join(first),
    )


def test_the_decisions_are_printed_where_they_are_asked_for(pool: Pool) -> None:
    first, second = pool.run(printed, env={"AUTOTP_LOG": "debug"})
    assert second == []
    lines = [line for line in first if "[DEBUG]" in line and "q_proj.weight" in line]
    assert len(lines) == 1 and "kind column; decided by tp_plan; rule" in lines[0]


def test_an_unknown_level_is_an_error_on_every_rank(pool: Pool) -> None:
    for said in pool.run(printed, env={"AUTOTP_LOG": "inf"}):
        assert said[0].startswith("AUTOTP_LOG: got 'inf', expected one of debug, info, warning")
