# SPDX-License-Identifier: Apache-2.0
"""Adapters that a sharded model cannot take are refused by name, and leave it as it was."""

from pathlib import Path

from tests.integration import peft_refusals_ranks
from tests.support.large_differences import large_differences
from tests.support.worker_pool import Pool


def test_what_a_sharded_model_cannot_take_is_refused_alike_on_every_rank(pool: Pool) -> None:
    first, second = pool.run(peft_refusals_ranks.refusals)
    assert first[0] == second[0]
    for name, part in {
        "DoRA": "use_dora: got True",
        "PiSSA": "init_lora_weights: got 'pissa', expected one of [True, False",
        "tokens": "trainable_token_indices: got [1]",
        "IA3": "peft_type: got IA3, expected LORA",
        "prefix": "peft_type: got PREFIX_TUNING, expected LORA",
        "no such layer": "not found in the base model",
        "other ranks": "lora_A.default.weight",
        "load_adapter": "call peft.PeftModel.from_pretrained(model, folder)",
        "copy": "a copy of a sharded model",
        "combined": "add_weighted_adapter: the model is sharded",
        "on meta": "low_cpu_mem_usage: got True",
        "safe merge": "safe_merge: got True, expected False",
        "safe unload": "safe_merge: got True, expected False",
        "merged while gathered": "cannot be merged or unmerged within gather_params",
        "a batch of adapters": "adapter_names: got several adapters for one batch",
        "of transformers": "use_dora: got True",
        "parametrized": "q_proj' was changed after the model was sharded",
        "destroyed": "the model was destroyed",
    }.items():
        assert first[0][name].startswith("ValueError: ") and part in first[0][name], name
    assert large_differences(first[1]) == {}


def test_the_model_is_as_it_was_where_one_rank_failed(pool: Pool) -> None:
    for said, same, found in pool.run(peft_refusals_ranks.one_rank_fails):
        for each in ("merged", "added", "deleted", "of transformers"):
            assert "on rank 1 of 2: RuntimeError: this rank failed" in said[each]
            assert same[each], each
        assert large_differences(found) == {}


def test_a_part_of_a_sharded_model_is_refused(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(peft_refusals_ranks.parts, str(tmp_path))
    assert first == second
    inside = "is a part of a sharded PeftModelForCausalLM"
    own = "its save_pretrained would write this rank's shards only"
    for name, said in first.items():
        own_way = "lm_head.weight was replaced" if name == "replaced" else inside
        assert said.startswith("ValueError: ")
        assert (own if " save_pretrained" in name else own_way) in said, (name, said)
    assert list(tmp_path.iterdir()) == []


def test_other_kinds_of_adapters_are_refused_by_name(pool: Pool) -> None:
    first, second = pool.run(peft_refusals_ranks.other_kinds)
    assert first == second
    for name, said in first.items():
        assert said.startswith("ValueError: ") and name in said.lower(), said
