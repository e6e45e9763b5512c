# SPDX-License-Identifier: Apache-2.0
"""Plans of the compiled core, as Python sees them."""

import gc

import pytest

from deepspeed_autotp._core import Kind, Model, Plan, Rules, Source, index_pattern
from tests.support.core_llama import HEADS, LAYERS, llama, preset


def test_a_plan_shards_columns_and_rows() -> None:
    plan = Plan(llama(), preset(), ranks=2)
    entries = {entry.name: entry for entry in plan.entries}
    up = entries["model.layers.1.mlp.up_proj.weight"]
    down = entries["model.layers.1.mlp.down_proj.weight"]
    assert (up.kind, up.dim, up.source, up.shape) == ("column", 0, "preset", (256, 64))
    assert up.rule == "preset llama[3]"
    assert up.view == (1, 256, 64)
    assert [up.local_shape(rank) for rank in range(2)] == [(128, 64)] * 2
    assert [up.runs(rank) for rank in range(2)] == [(0, 128), (128, 128)]
    assert (down.kind, down.dim, down.view) == ("row", 1, (64, 256, 1))
    assert down.local_shape(1) == (64, 128)
    assert plan.ranks == 2


def test_every_weight_is_covered_by_the_runs_of_all_ranks() -> None:
    for ranks in (1, 2, 3, 4):
        for entry in Plan(llama(key_heads=HEADS), preset(), ranks=ranks).entries:
            if entry.dim < 0:
                assert all(entry.local_shape(rank) == entry.shape for rank in range(ranks))
                assert all(entry.runs(rank) == () for rank in range(ranks))
                assert all(entry.width(rank) == entry.view[1] for rank in range(ranks))
                continue
            covered = []
            for rank in range(ranks):
                runs = entry.runs(rank)
                assert sum(runs[1::2]) == entry.width(rank) == entry.local_shape(rank)[entry.dim]
                for start, length in zip(runs[::2], runs[1::2], strict=True):
                    covered.extend(range(start, start + length))
            assert sorted(covered) == list(range(entry.shape[entry.dim]))


def test_key_heads_are_shared_when_there_are_fewer_than_ranks() -> None:
    plan = Plan(llama(key_heads=2), preset(), ranks=4)
    key = next(entry for entry in plan.entries if entry.name.endswith("k_proj.weight"))
    assert [key.runs(rank) for rank in range(4)] == [(0, 16), (0, 16), (16, 16), (16, 16)]
    assert [key.shared(rank) for rank in range(4)] == [
        ((0, 16, 0, 2),),
        ((0, 16, 0, 2),),
        ((0, 16, 2, 2),),
        ((0, 16, 2, 2),),
    ]


def test_a_weight_that_nobody_shares_has_no_shared_runs() -> None:
    plan = Plan(llama(), preset(), ranks=2)
    assert all(entry.shared(rank) == () for entry in plan.entries for rank in range(2))


def test_layers_point_at_their_entries() -> None:
    plan = Plan(llama(), preset(), ranks=2)
    sharded = [layer for layer in plan.layers if layer.kind in ("column", "row")]
    assert len(sharded) >= 7 * LAYERS
    for layer in sharded:
        assert plan.entries[layer.weight].name == f"{layer.module}.weight"
        assert layer.bias == -1
        assert isinstance(layer.gather_output, bool) and isinstance(layer.split_input, bool)
    assert repr(sharded[0]).startswith("<Layer model.")


def test_integers_become_local() -> None:
    plan = Plan(llama(), preset(), ranks=2)
    found = {(local.module, local.key): local for local in plan.integers}
    heads = found["model.layers.0.self_attn", "num_attention_heads"]
    assert (heads.full, heads.values) == (HEADS, (2, 2))
    assert "num_attention_heads" in repr(heads)


def test_a_tied_weight_repeats_the_entry_of_the_first() -> None:
    plan = Plan(llama(), preset(), ranks=2)
    first, last = plan.entries[0], plan.entries[-1]
    assert (first.tied_to, last.tied_to) == (-1, 0)
    assert [first.runs(rank) for rank in range(2)] == [last.runs(rank) for rank in range(2)]


def test_a_replicated_weight_is_one_view() -> None:
    plan = Plan(llama(tied=False), Rules(), ranks=2, defaults=False, families=False)
    for entry in plan.entries:
        assert (entry.kind, entry.dim, entry.rule) == ("replicated", -1, "")
        assert entry.source == "-"
        assert entry.view == (1, entry.shape[0] * entry.shape[1], 1)
    assert "model.embed_tokens.weight" in repr(plan.entries[0])


def test_the_table_groups_layers_and_counts_bytes() -> None:
    plan = Plan(llama(), preset(), ranks=2)
    rows = {row.pattern: row for row in plan.table()}
    row = rows["model.layers.*.mlp.up_proj.weight"]
    assert row.count == LAYERS
    assert row.full_bytes == LAYERS * 256 * 64 * 4
    assert row.local_bytes == (row.full_bytes // 2,) * 2
    assert row.entry.name == "model.layers.0.mlp.up_proj.weight"
    assert plan.entries[row.index].name == row.entry.name
    assert repr(row) == "<Row model.layers.*.mlp.up_proj.weight x 3>"
    assert sum(row.count for row in rows.values()) == len(plan.entries)


def test_the_hash_tells_plans_apart_and_nothing_else() -> None:
    first = Plan(llama(), preset(), ranks=2)
    again = Plan(llama(), preset(), ranks=2)
    assert first.hash == again.hash
    assert len(first.hash) == 16 and int(first.hash, 16) >= 0
    others = {
        Plan(llama(), preset(), ranks=4).hash,
        Plan(llama(layers=2), preset(), ranks=2).hash,
        Plan(llama(), Rules(), ranks=2, defaults=False).hash,
    }
    assert len(others) == 3 and first.hash not in others


def test_a_plan_outlives_its_model_and_rules_and_entries_outlive_the_plan() -> None:
    plan = Plan(llama(), preset(), ranks=2)
    entry, row, layer = plan.entries[2], plan.table()[0], plan.layers[0]
    expected = (entry.name, entry.rule, entry.runs(1), row.entry.name, layer.module)
    del plan
    gc.collect()
    assert (entry.name, entry.rule, entry.runs(1), row.entry.name, layer.module) == expected


def test_entries_are_made_once() -> None:
    plan = Plan(llama(), preset(), ranks=2)
    assert plan.entries is plan.entries


def test_rules_added_later_leave_a_plan_alone() -> None:
    rules = preset()
    plan = Plan(llama(), rules, ranks=2)
    before = plan.hash
    for _ in range(100):
        rules.add([".*"], {"partition_type": "skip"}, label="later")
    assert plan.hash == before
    assert plan.entries[1].rule.startswith("preset llama")


def test_messages_are_lines_for_the_user() -> None:
    rules = preset()
    rules.add(["no_such_name"], {}, label="layer_specs[9]")
    messages = Plan(llama(), rules, ranks=2).messages
    assert any("layer_specs[9]" in note for note in messages)


def test_a_rule_that_cannot_hold_names_parameter_and_rule() -> None:
    rules = Rules()
    rules.add([r".*down_proj"], {"shape": [3, -1]}, label="layer_specs[0]")
    with pytest.raises(ValueError, match=r"down_proj") as caught:
        Plan(llama(), rules, ranks=2)
    assert "layer_specs[0]" in str(caught.value)


@pytest.mark.parametrize("rank", [-1, 2, 1 << 40])
def test_a_rank_outside_is_an_error(rank: int) -> None:
    entry = Plan(llama(), preset(), ranks=2).entries[0]
    for method in (entry.local_shape, entry.runs, entry.shared):
        with pytest.raises(ValueError, match="rank: "):
            method(rank)
        with pytest.raises(TypeError, match="rank: expected an int, got str"):
            method("0")  # type: ignore[arg-type]


def test_a_plan_names_the_argument_that_is_wrong() -> None:
    model, rules = llama(), preset()
    with pytest.raises(TypeError, match="model: expected a Model, got Rules"):
        Plan(rules, rules, ranks=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rules: expected Rules, got list"):
        Plan(model, [], ranks=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing required keyword-only argument: 'ranks'"):
        Plan(model, rules)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="strict: expected True or False, got int"):
        Plan(model, rules, ranks=2, strict=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="head_patterns: expected a list or tuple, got str"):
        Plan(model, rules, ranks=2, head_patterns="lm_head")
    with pytest.raises(ValueError, match="TP size is 0"):
        Plan(model, rules, ranks=0)
    with pytest.raises(ValueError, match="grain"):
        Plan(model, rules, ranks=2, grain=0)
    with pytest.raises(ValueError, match="embedding"):
        Plan(model, rules, ranks=2, embedding_dim=2)


def test_layers_of_modules_that_are_named_are_sharded_individually() -> None:
    plan = Plan(llama(), preset(), ranks=2, individual=["model.layers.*.mlp"])
    layers = {layer.module: layer for layer in plan.layers}
    assert layers["model.layers.0.mlp.up_proj"].gather_output
    assert layers["model.layers.0.mlp.down_proj"].split_input
    assert not layers["model.layers.0.self_attn.o_proj"].split_input
    with pytest.raises(ValueError, match=r"individual\[0\]: no module is called 'mpl'"):
        Plan(llama(), preset(), ranks=2, individual=["mpl"])


def test_modules_that_are_named_are_replicated() -> None:
    replicated = ["model.layers.*.mlp", "model.layers.1"]
    plan = Plan(llama(), preset(), ranks=2, replicated=replicated)
    sharded = {entry.name for entry in plan.entries if entry.dim >= 0 and "layers" in entry.name}
    assert sharded == {
        f"model.layers.{i}.self_attn.{x}_proj.weight" for i in (0, 2) for x in "qkvo"
    }
    with pytest.raises(ValueError, match=r"replicated\[0\]: no module is called 'mpl'"):
        Plan(llama(), preset(), ranks=2, replicated=["mpl"])
    with pytest.raises(TypeError, match="replicated: expected a list or tuple"):
        Plan(llama(), preset(), ranks=2, replicated="mlp")  # type: ignore[arg-type]


def test_kinds_and_sources_are_enums_whose_values_are_words() -> None:
    plan = Plan(llama(), preset(), ranks=2)
    entries = {entry.name: entry for entry in plan.entries}
    up = entries["model.layers.1.mlp.up_proj.weight"]
    assert up.kind is Kind.COLUMN and up.source is Source.PRESET
    assert f"{up.kind} by {up.source}" == "column by preset"
    assert all(kind.name == kind.value.upper().replace(" ", "_").replace("+", "_")
               for kind in Kind if kind is not Kind.SKIPPED)  # fmt: skip
    assert Kind("skip") is Kind.SKIPPED and Source("-") is Source.NONE


def test_a_plan_says_what_is_sharded_tied_and_counted() -> None:
    plan = Plan(llama(key_heads=2), preset(), ranks=4)
    entries = {entry.name: entry for entry in plan.entries}
    key = entries["model.layers.0.self_attn.k_proj.weight"]
    assert [key.is_counted(rank) for rank in range(4)] == [True, False, True, False]
    assert all(entries["model.layers.0.mlp.up_proj.weight"].is_counted(r) for r in range(4))
    assert all(entry.is_sharded == (entry.dim >= 0) for entry in plan.entries)
    assert [entry.name for entry in plan.entries if entry.is_tied] == ["lm_head.weight"]


def test_a_layer_says_which_features_each_rank_has_and_what_holds_it() -> None:
    plan = Plan(llama(key_heads=2), preset(), ranks=4)
    layers = {layer.module: layer for layer in plan.layers}
    key = layers["model.layers.2.self_attn.k_proj"]
    assert key.features == (32, (16,) * 4, ((0, 16), (0, 16), (16, 16), (16, 16)))
    assert key.block == ("model.layers.*.self_attn",)
    assert layers["model.layers.2.self_attn.o_proj"].has_full_output
    assert not (key.has_full_output or key.gathers_weight or key.is_heuristic)


def test_samples_stand_for_all_names_that_differ_in_indices() -> None:
    plan = Plan(llama(), preset(), ranks=2)
    kept = {plan.entries[index].name for index in plan.samples}
    assert "model.layers.0.mlp.up_proj.weight" in kept
    assert f"model.layers.{LAYERS - 1}.mlp.up_proj.weight" in kept
    patterns = {index_pattern(entry.name) for entry in plan.entries}
    assert {index_pattern(name) for name in kept} == patterns
    assert {entry.name for entry in plan.entries if not entry.is_sharded} <= kept
    assert "model.layers.1.mlp.up_proj.weight" not in kept


def test_the_layout_hash_is_of_the_runs_and_not_of_the_rules() -> None:
    by_preset = Plan(llama(), preset(), ranks=2)
    rules = Rules()
    rules.add([r".*\.(o|down)_proj\.weight"], {"partition_type": "row"}, label="a")
    rules.add([r".*_proj\.weight"], {"partition_type": "column"}, label="b")
    by_rules = Plan(llama(), rules, ranks=2)
    assert by_rules.layout_hash == by_preset.layout_hash
    others = [
        Plan(llama(), preset(), ranks=4),
        Plan(llama(), preset(), ranks=2, replicated=["lm_head"]),
    ]
    assert by_preset.layout_hash not in {plan.layout_hash for plan in others}


def test_a_model_without_modules_has_no_plan() -> None:
    with pytest.raises(ValueError, match="the model has no modules"):
        Plan(Model([], []), Rules(), ranks=2)


def test_vocab_parallel_lm_head_is_one_of_three() -> None:
    with pytest.raises(TypeError, match="vocab_parallel_lm_head: expected True, False or None"):
        Plan(llama(), preset(), ranks=2, vocab_parallel_lm_head=1)  # type: ignore[arg-type]
