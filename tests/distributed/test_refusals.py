# SPDX-License-Identifier: Apache-2.0
"""Bad input gives one clear error on every rank, and the model is as it was.

refusals_ranks.py checks the model; a rank that waits for ever fails by timeout.
"""

from typing import Any

import pytest

from tests.distributed import refusals_ranks
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool


def test_a_snapshot_tells_a_sharded_model_from_an_unsharded_one(pool: Pool) -> None:
    assert pool.run(refusals_ranks.snapshot_of_success) == [True, True]


@pytest.mark.parametrize(
    ("section", "more", "words"),
    [
        ({"autotp_size": "2"}, {}, ["tensor_parallel.autotp_size: got '2' (str)"]),
        ({"autotp_size": True}, {}, ["autotp_size: got True (bool)"]),
        ({"autotp_size": 2, "tp": 2}, {}, ["tensor_parallel.tp: got 2 (int)", "a dictionary"]),
        ({"autotp_sise": 2}, {}, ["autotp_sise: unknown key", "did you mean 'autotp_size'"]),
        (
            {"autotp_size": 2, "dtype": "bf61", "tp_overlap_comm": 1, "tp": {"tp_size": "x"}},
            {},
            ["3 problems", "bf61", "tp_overlap_comm: got 1 (int)", "tp.tp_size: got 'x' (str)"],
        ),
        (
            {"autotp_size": 2, "preset_model": "lama"},
            {},
            ["preset_model", "lama", "llama"],
        ),
        (
            {"autotp_size": 2, "tp": {"tp_size": 4}},
            {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
            [
                "2 conflicts",
                "autotp_size is 2, but tensor_parallel.tp.tp_size is 4",
                "bf16.enabled: true",
            ],
        ),
        ({"tp": {"tp_size": 2}}, {}, ["tp.tp_size is 2", "autotp_size", "is not set"]),
        (
            {"autotp_size": "auto"},
            {},
            ["tensor_parallel.autotp_size: got 'auto'", "number of ranks"],
        ),
        ({"autotp_size": 3}, {}, ["autotp_size is 3", "does not divide the 2 ranks", "fit: 1, 2"]),
        ({"autotp_size": 4}, {}, ["autotp_size is 4", "does not divide the 2 ranks"]),
        (
            {"autotp_size": 2, "partition_config": {"layer_specs": [{"patterns": ["(q_proj"]}]}},
            {},
            ["layer_specs[0].patterns[0]", "(q_proj"],
        ),
        (
            {
                "autotp_size": 2,
                "partition_config": {
                    "strict_mode": True,
                    "layer_specs": [{"patterns": [r".*\.q_porj"], "partition_type": "column"}],
                },
            },
            {},
            ["layer_specs[0]", "matches nothing", "q_proj"],
        ),
        (
            {
                "autotp_size": 2,
                "partition_config": {
                    "layer_specs": [{"patterns": [r".*\.q_porj"], "partition_type": "column"}],
                },
            },
            {},
            ["the rules shard nothing of LlamaForCausalLM", "q_porj", "partition_config"],
        ),
        (
            {"autotp_size": 2},
            {"bf16": {"enabled": "yes please"}},
            ["bf16.enabled", "yes please", "true or false"],
        ),
        (
            {"autotp_size": 2},
            {"train_batch_size": 7},
            ["DeepSpeed refuses the configuration", "7"],
        ),
        (
            {"autotp_size": 2},
            {"zero_optimization": {"stage": 9}},
            ["DeepSpeed refuses the configuration", "stage"],
        ),
    ],
)
def test_a_wrong_section_is_refused_with_its_key_and_value(
    pool: Pool, section: dict[str, Any], more: dict[str, Any], words: list[str]
) -> None:
    text = same_error(pool.run(refusals_ranks.refused_section, section, more))
    assert text.startswith("ValueError: ")
    assert [word for word in words if word not in text] == []
    assert "on rank" not in text, "all ranks made the same mistake"


@pytest.mark.parametrize("rank", [0, 1])
def test_sections_that_differ_between_ranks_are_listed(pool: Pool, rank: int) -> None:
    one = {"autotp_size": 2, "tp_grain_size": 8, "preset_model": "llama"}
    text = same_error(pool.run(refusals_ranks.refused_on_rank, rank, one, {"autotp_size": 2}))
    assert "the configuration differs between the ranks" in text
    grain = "tp_grain_size: 8 on rank 0, but 1 on rank 1"
    assert (grain if rank == 0 else "tp_grain_size: 1 on rank 0, but 8 on rank 1") in text
    assert "preset_model" in text


def test_a_tp_size_on_one_rank_only_is_refused(pool: Pool) -> None:
    text = same_error(
        pool.run(refusals_ranks.refused_on_rank, 1, {"autotp_size": 2}, {"autotp_size": 0})
    )
    assert "autotp_size: 0 or 1 on rank 0, but 2 on rank 1" in text


def test_a_misspelt_section_is_not_passed_over(pool: Pool) -> None:
    text = same_error(pool.run(refusals_ranks.refused_spelling, "tensor_paralel"))
    assert "Unknown config section 'tensor_paralel'. Did you mean 'tensor_parallel'?" in text


def test_tp_sizes_that_differ_between_ranks_are_refused(pool: Pool) -> None:
    text = same_error(
        pool.run(refusals_ranks.refused_on_rank, 3, {"autotp_size": 4}, {"autotp_size": 2}, ranks=4)
    )
    assert "autotp_size: 2 on ranks 0, 1, 2, but 4 on rank 3" in text


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("missing", ["configuration file '/nowhere/config.json': there is no such file"]),
        ("folder", ["cannot read the configuration file", "directory"]),
        ("broken", ["cannot read the configuration file", "broken.json"]),
        ("base64", ["bm90IGpzb24="]),
        ("number", ["got 3 (int)", "a dictionary, the path of a JSON file"]),
        ("none", ["initialize: config: got None", "pass config="]),
    ],
)
@pytest.mark.parametrize("rank", [None, 0, 1], ids=["all", "rank0", "rank1"])
def test_a_configuration_that_cannot_be_read_is_refused(
    pool: Pool, form: str, words: list[str], rank: int | None
) -> None:
    text = same_error(pool.run(refusals_ranks.refused_config, form, rank))
    assert [word for word in words if word not in text] == []
    assert ("on rank" in text) == (rank is not None)
    assert rank is None or f"on rank {rank} of 2: " in text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("shape", ["mlp.gate_proj.weight on rank 0", "[112, 64]", "on rank 1", "[128, 64]"]),
        ("layers", ["only rank 1 has model.layers.2.self_attn.q_proj.weight", "more"]),
        ("family", ["only rank 1 has model.layers.0.self_attn.q_norm.weight"]),
        ("dtype", ["embed_tokens.weight on rank 0", "float32", "bfloat16"]),
        ("bias", ["only rank 1 has model.layers.0.mlp.gate_proj.bias"]),
    ],
)
def test_models_that_differ_between_ranks_are_refused(
    pool: Pool, kind: str, words: list[str]
) -> None:
    text = same_error(pool.run(refusals_ranks.refused_pair, kind))
    assert "the ranks made different plans" in text
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("meta", ["model.layers.1.mlp.up_proj.weight", "meta device"]),
        ("gradient", ["model.norm.weight has a gradient", "zero_grad"]),
        ("no plan", ["Handmade has no tensor-parallel plan", "preset_model", "partition_config"]),
        ("compiled", ["compiled already", "shard the model first"]),
        ("no parameters", ["Sequential has no parameters"]),
    ],
)
def test_a_model_that_cannot_be_sharded_is_refused(pool: Pool, kind: str, words: list[str]) -> None:
    text = same_error(pool.run(refusals_ranks.refused_model, kind))
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("kind", ["none", "class", "text"])
def test_what_is_no_model_is_refused(pool: Pool, kind: str) -> None:
    text = same_error(pool.run(refusals_ranks.refused_what, kind))
    assert "initialize: model: got" in text and "expected a torch.nn.Module" in text


def test_a_sharded_model_is_refused_where_it_does_not_fit(pool: Pool) -> None:
    results = pool.run(refusals_ranks.refused_twice, ranks=4)
    assert all(texts == results[0] for texts in results)
    other, off, inside, again = results[0]
    assert "sharded over the ranks [0, 1] already" in other and "autotp_size is 4" in other
    assert "sharded over the ranks [0, 1] already" in off and "autotp_size is 0" in off
    assert "Sequential is sharded already" in inside
    assert "LlamaForCausalLM is sharded already" in again


def test_an_optimizer_with_state_is_refused(pool: Pool) -> None:
    assert "the optimizer holds state" in same_error(pool.run(refusals_ranks.refused_optimizer))


@pytest.mark.parametrize(
    ("where", "words"),
    [("record", "tp.tp_group"), ("config", "tp.tp_group"), ("mpu", "mpu")],
)
def test_groups_of_other_than_consecutive_ranks_are_refused(
    pool: Pool, where: str, words: str
) -> None:
    text = same_error(pool.run(refusals_ranks.refused_group, where, ranks=4))
    assert f"{words}: got a group of the ranks [0, 2]" in text and "here [0, 1]" in text


def test_a_pipeline_module_is_refused(pool: Pool) -> None:
    text = same_error(pool.run(refusals_ranks.refused_pipeline))
    assert "PipelineModule" in text


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_rank_that_fails_in_planning_fails_all(pool: Pool, rank: int) -> None:
    text = same_error(pool.run(refusals_ranks.fail_in_planning, rank, ranks=4))
    assert f"on rank {rank} of 4: ZeroDivisionError" in text


@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 2), (0, 4), (3, 4)])
def test_a_rank_that_fails_to_change_a_module_fails_all(pool: Pool, rank: int, ranks: int) -> None:
    # Of four ranks, those of the other TP group hear of it, too.
    texts = pool.run(refusals_ranks.fail_to_switch, rank, ranks=ranks)
    assert f"on rank {rank} of {ranks}: KeyError" in same_error(texts)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nothing", "no TP size is given"),
        ("two", "got several of tp_size, tp_group and mesh; pass one"),
        ("mesh", "dimensions ['a', 'b']"),
        ("size", "the TP size is 3, which does not divide the 2 ranks"),
        ("zero", "tp_size: got 0 (int)"),
        ("text", "tp_size: got '2' (str)"),
        ("one rank's size", "autotp_size: 1 on rank 0, but 2 on rank 1"),
        ("one rank's type", "on rank 0 of 2: parallelize: tp_size: got 2.0 (float)"),
        ("config", "TP size: tp_size of parallelize is 2, but config.autotp_size is 4"),
        ("nested", "TP size: tp_size of parallelize is 2, but config.tp.tp_size is 4"),
        ("config text", "got 'llama' (str), expected a dictionary"),
        ("inputs", "the self-check cannot run the model before it is sharded: TypeError"),
        ("one rank's inputs", "a self-check: False on rank 0, but True on rank 1"),
        ("different inputs", "example_inputs['x']"),
        ("group", "tp_group: got 'tp' (str), expected a process group"),
    ],
)
def test_arguments_of_parallelize_are_checked(pool: Pool, kind: str, words: str) -> None:
    text = same_error(pool.run(refusals_ranks.refused_call, kind))
    assert words in text
