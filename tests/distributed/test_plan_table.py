# SPDX-License-Identifier: Apache-2.0
"""The plan as people read it: what is sharded, why, and how much of it each rank holds."""

from typing import Any

import pytest
import torch
from rich.console import Console

from deepspeed_autotp import TPTrainingConfig, plan_table
from deepspeed_autotp.planning.model_description import describe
from deepspeed_autotp.planning.planner import make_plan
from tests.support.small_models import build
from tests.support.worker_pool import Pool

UNEVEN: dict[str, Any] = {
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "hidden_size": 96,
    "vocab_size": 257,
    "tied": True,
}
GOLDEN = """
                                      Sharding plan over 2 ranks

 parameters                                         kind            full    per rank      bytes/rank
 ────────────────────────────────────────────────────────────────────────────────────────────────────
 model.embed_tokens.weight                          vocabulary    257x96  128|129x96    49.2|49.5 kB
   tp_plan: embedding_rowwise
 model.layers.*.self_attn.q_proj.weight x2          column         96x96    64|32x96    49.2|24.6 kB
   tp_plan: colwise
 model.layers.*.self_attn.k_proj.weight x2          column         24x96     16|8x96     12.3|6.1 kB
   tp_plan: colwise
 model.layers.*.self_attn.v_proj.weight x2          column         24x96     16|8x96     12.3|6.1 kB
   tp_plan: colwise
 model.layers.*.self_attn.o_proj.weight x2          row            96x96    96x64|32    49.2|24.6 kB
   tp_plan: rowwise
 model.layers.*.mlp.gate_proj.weight x2             column        112x96       56x96         43.0 kB
   tp_plan: colwise
 model.layers.*.mlp.up_proj.weight x2               column        112x96       56x96         43.0 kB
   tp_plan: colwise
 model.layers.*.mlp.down_proj.weight x2             row           96x112       96x56         43.0 kB
   tp_plan: rowwise
 model.layers.*.input_layernorm.weight x2           replicated        96          96       768 bytes
 model.layers.*.post_attention_layernorm.weight x2  replicated        96          96       768 bytes
 model.norm.weight                                  replicated        96          96       384 bytes
 lm_head.weight                                     vocabulary    257x96  128|129x96
   tied to model.embed_tokens.weight

 full model                                                     543.0 kB              303.0|241.9 kB
"""


LARGE: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def shown(
    changes: dict[str, Any], ranks: int, width: int, section: dict[str, Any]
) -> tuple[list[str], list[str], list[int]]:
    """Printed lines, names of the parameters, and bytes: of the full model, and of each rank."""
    with torch.device("meta"):
        model = build("llama", **{"tied": False, **changes})
    settings = TPTrainingConfig(autotp_size=ranks, **section)
    plan = make_plan(describe(model), settings, ranks=ranks)
    console = Console(width=width, color_system=None)
    with console.capture() as printed:
        console.print(plan_table(plan))
    own = [
        sum(torch.Size(e.local_shape(rank)).numel() for e in plan.entries if e.tied_to < 0)
        for rank in range(ranks)
    ]
    sizes = [4 * size for size in (sum(p.numel() for p in model.parameters()), *own)]
    lines = [line.rstrip() for line in printed.get().splitlines()]
    return lines, [name for name, _ in model.named_parameters()], sizes


def test_the_table_of_a_llama_says_what_is_sharded_and_why(pool: Pool) -> None:
    [(lines, _, _)] = pool.run(shown, UNEVEN, 2, 120, {}, ranks=1)
    assert lines == [*GOLDEN.strip("\n").splitlines(), ""]


@pytest.mark.parametrize("width", [80, 120])
def test_every_line_of_a_large_model_fits(pool: Pool, width: int) -> None:
    [(lines, names, _)] = pool.run(shown, LARGE, 3, width, {}, ranks=1)
    assert max(map(len, lines)) <= width
    for words in ("3072|2048x8192", "28672x8192", "128256x8192", "full model", "colwise"):
        assert any(words in line for line in lines), words
    printed = "".join(line.split("  ")[0].strip() for line in lines)
    for name in names:
        assert name.replace(".0.", ".*.").replace(".1.", ".*.") in printed


def test_the_last_row_has_the_bytes_of_the_full_model_and_of_each_rank(pool: Pool) -> None:
    [(lines, _, (full, *own))] = pool.run(shown, UNEVEN, 2, 100, {}, ranks=1)
    last = lines[-2].split()
    assert last[:3] == ["full", "model", f"{full / 1000:.1f}"]
    assert last[4] == "|".join(f"{size / 1000:.1f}" for size in own)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"preset_model": "llama"}, ["preset: preset llama[0]", "default: output head"]),
        (
            {"partition_config": {"layer_specs": [{"patterns": [r".*\.[qkv]_proj\.weight"]}]}},
            ["partition_config: layer_specs[0]"],
        ),
    ],
)
def test_the_rule_that_decided_is_named(
    pool: Pool, section: dict[str, Any], words: list[str]
) -> None:
    [(lines, _, _)] = pool.run(shown, {}, 2, 120, section, ranks=1)
    assert [word for word in words if not any(word in line for line in lines)] == []
