# SPDX-License-Identifier: Apache-2.0
"""What people do with a model around ``parallelize`` is as in one process."""

from typing import Any

import pytest

from tests.distributed import parallelize_ranks
from tests.support.large_differences import EXACT, large_differences
from tests.support.worker_pool import Pool


def test_ranks_are_named_by_size_group_or_mesh(pool: Pool) -> None:
    first, *_, last = pool.run(parallelize_ranks.meshes, ranks=4)
    assert first | {"other names": "", "no name": ""} == {
        "tp_size": (0, 1),
        "config": (0, 1, 2, 3),
        "group": (0, 2),
        "group of others": "parallelize: tp_group: this rank is not in the group; pass the group "
        "it belongs to",
        "group and its size": (0, 2),
        "mesh of one": (0, 1, 2, 3),
        "mesh of two": (0, 2),
        "its other part": (0, 1),
        "no name": "",
        "other names": "",
        "no mesh": "parallelize: mesh: got int, expected a DeviceMesh",
    }
    assert (last["tp_size"], last["mesh of two"], last["group"]) == ((2, 3), (1, 3), (1, 3))
    for name in ("no name", "other names"):
        assert 'name the TP dimension "tp"' in str(first[name])


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "use_cache": False},
        {"do_sample": True},
    ],
    ids=["greedy", "static cache", "beams", "no cache", "sampled"],
)
def test_generation_gives_the_tokens_of_one_process(pool: Pool, how: dict[str, Any]) -> None:
    for unsharded, sharded in pool.run(parallelize_ranks.generate_with, how):
        assert sharded == unsharded
        assert len(unsharded) == 4 and len(unsharded[0]) == 15


def test_hooks_from_before_fire_as_in_one_process(pool: Pool) -> None:
    for unsharded, sharded, apart in pool.run(parallelize_ranks.hooks):
        assert sharded == unsharded and len(unsharded) == 12
        assert apart < EXACT


def test_weights_of_one_rank_go_out_and_come_in(pool: Pool) -> None:
    for found in pool.run(parallelize_ranks.states):
        assert found["keys"] and found["loaded"] and found["saved"]
        assert found["full"] == "nothing"  # is raised
        for how in ("pickle", "save"):
            assert str(found[how]).startswith(
                "TypeError: cannot pickle a sharded model: it holds a process group"
            )
            assert "full_state_dict" in str(found[how])


def test_a_deep_copy_trains_on_its_own(pool: Pool) -> None:
    for found, kept in pool.run(parallelize_ranks.copies):
        assert large_differences(found) == {} and kept


def test_saving_a_shard_as_a_model_is_refused(pool: Pool) -> None:
    found = pool.run(parallelize_ranks.saves_without_a_state)
    for text, _ in found:
        assert text.startswith("ValueError: LlamaForCausalLM is sharded")
        assert "deepspeed_autotp.save_pretrained(model, folder)" in text
    assert [written for _, written in found] == [True, False]  # transformers writes on the first


@pytest.mark.parametrize("engine", [False, True])
def test_ranks_of_one_tp_group_with_other_batches_are_told(pool: Pool, engine: bool) -> None:
    for text, apart in pool.run(parallelize_ranks.other_batches, engine):
        assert text.startswith("ValueError: the ranks [0, 1] are in one TP group of LlamaFor")
        assert "dist.get_rank() // 2" in text
        assert apart < 1e-6


@pytest.mark.parametrize("given", [False, True])
def test_a_handmade_model_trains_with_its_rules(pool: Pool, given: bool) -> None:
    for unsharded, sharded in pool.run(parallelize_ranks.handmade_curve, given):
        assert sharded == pytest.approx(unsharded, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", ["pass tp_size, tp_group, mesh or config.autotp_size", "no TP size is given"]),
        ("zero", ["tp_size: got 0 (int), expected a number of ranks"]),
        ("true", ["tp_size: got True (bool)"]),
        ("text", ["tp_size: got '2' (str)"]),
        ("five", ["the TP size is 5", "does not divide the 2 ranks"]),
        ("both", ["got several of tp_size, tp_group and mesh; pass one"]),
        ("group", ["tp_group: got 3 (int), expected a process group"]),
        ("mesh", ["mesh: got int, expected a DeviceMesh"]),
        ("config", ["got [1] (list), expected a dictionary"]),
        ("key", ["preset_modle", "did you mean 'preset_model'"]),
        ("device", ["device: got 'meta' (str), expected a device of this machine"]),
        ("no device", ["device: got 'cuad' (str), expected a device", "cuad"]),
        ("degree", ["TP size: tp_size of parallelize is 2, but config.autotp_size is 4"]),
        ("example", ["example_inputs: got Tensor", "keyword arguments of LlamaForCausalLM"]),
        ("argument", ["the self-check cannot run the model before it is sharded"]),
        ("handmade", ["Handmade has no tensor-parallel plan", "partition_config"]),
        ("handmade check", ["the inputs of Handmade are not known", "example_inputs"]),
        ("handmade wrong", ["qkv", "layer_specs[0]"]),
        ("handmade skips", ["the rules shard nothing of Handmade", "partition_config"]),
    ],
)
def test_a_wrong_call_is_refused_with_the_reason(pool: Pool, name: str, words: list[str]) -> None:
    texts = pool.run(parallelize_ranks.refused, name)
    assert texts[0] == texts[1]
    assert texts[0].startswith("ValueError: ")
    assert [word for word in words if word not in texts[0]] == []


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_model_is_sharded_on_its_way_to_a_device(pool: Pool, name: str) -> None:
    if name == "cuda":  # where the tests are there, but maybe not all that the pool loads
        pytest.importorskip("deepspeed")
    for worst, there in pool.run(parallelize_ranks.on_device, name):
        assert worst < 1e-5 and there


def test_groups_have_the_timeout_that_the_user_gave(pool: Pool) -> None:
    assert pool.run(parallelize_ranks.timeouts, timeout=50.0) == [[80.0] * 3] * 2


@pytest.mark.parametrize("what", [None, "llama", 3])
def test_what_is_no_model_is_refused(pool: Pool, what: object) -> None:
    for text in pool.run(parallelize_ranks.refused_model, what):
        assert text.startswith("ValueError: parallelize: model: got")
        assert "expected a torch.nn.Module" in text


@pytest.mark.sample(2)
@pytest.mark.parametrize("sequence", [False, True], ids=["tokens full", "tokens sharded"])
@pytest.mark.parametrize("rules", [False, True], ids=["plan", "rules"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_adapters_train_as_in_one_process(
    pool: Pool, ranks: int, rules: bool, sequence: bool
) -> None:
    for found, only in pool.run(parallelize_ranks.compare_adapted, rules, sequence, ranks=ranks):
        assert large_differences(found) == {} and only


@pytest.mark.parametrize(
    ("family", "wrapped", "saved", "ranks"),
    [
        ("llama", ["q_proj", "o_proj", "down_proj"], ["k_proj", "v_proj"], 3),
        ("qwen3", ["k_proj", "v_proj", "gate_proj"], ["q_proj", "lm_head"], 3),
        ("gpt_neox", ["query_key_value", "dense_4h_to_h"], [], 2),
    ],
)
def test_every_copy_of_a_layer_and_its_factors_are_sharded_alike(
    pool: Pool, family: str, wrapped: list[str], saved: list[str], ranks: int
) -> None:
    for found in pool.run(parallelize_ranks.sharded_alike, family, wrapped, saved, ranks=ranks):
        assert [name for name, same in found.items() if not same] == []
        assert any("lora_B" in name for name in found)


def test_other_adapters_are_refused_by_name(pool: Pool) -> None:
    for said in pool.run(parallelize_ranks.other_adapters):
        assert len(said) == 3
        for text in said:
            assert text.startswith("ValueError: 'base_model.model.model.layers.0.self_attn.q_proj'")
            assert "is not plain LoRA" in text


@pytest.mark.parametrize("case", parallelize_ranks.ADAPTERS)
def test_adapters_are_sharded_as_the_layers_beside_them(pool: Pool, case: str) -> None:
    # Three ranks: the heads and features of the ranks differ.
    for found, share in pool.run(parallelize_ranks.compare_adapters, case, ranks=3):
        assert large_differences(found) == {}
        assert share < 0.5
