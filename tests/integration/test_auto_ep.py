# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's AutoEP around a sharded model: as in one process, or refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepspeed_autotp.checkpoint.open_checkpoint import open_checkpoint
from tests.integration import auto_ep_ranks as ranks
from tests.integration.auto_ep_ranks import Case
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool

# Ranks of the run, TP size and ranks that have all experts between them.
LAYOUTS = ((2, 2, 2), (4, 2, 2), (4, 2, 4))


def trained(pool: Pool, case: Case, size: int) -> None:
    for found in pool.run(ranks.train, case, ranks=size, timeout=110):
        assert found["start"] == 0.0, found
        assert found["losses"] < 1e-5 and found["weights"] < 1e-5, found
        assert found["parameters"] == 0
        if case.clip:
            assert found["norms"] == pytest.approx(found["expected"], rel=1e-5)


@pytest.mark.sample(9)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "qwen2_moe"])
@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_trains_as_one_process(
    pool: Pool, name: str, zero: int, layout: tuple[int, int, int]
) -> None:
    size, tp, ep = layout
    trained(pool, Case(name, zero=zero, tp=tp, ep=ep, clip=0.5), size)


def test_load_balancing_losses_train_routers_as_in_one_process(pool: Pool) -> None:
    case = Case("mixtral", zero=1, auxiliary=0.1, clip=0.5)
    trained(pool, case, 2)
    trained(pool, replace(case, name="qwen3_moe", zero=2, accumulate=2), 4)


@pytest.mark.parametrize(("frozen", "zero"), [("experts", 0), ("gate_up_proj", 1), ("gate.", 2)])
def test_frozen_experts_and_routers_stay_as_they_are(pool: Pool, frozen: str, zero: int) -> None:
    trained(pool, Case("mixtral", zero=zero, clip=0.5, frozen=frozen), 2)


@pytest.mark.long
def test_a_compiled_model_trains_as_one_process(pool: Pool) -> None:
    trained(pool, Case("mixtral", zero=1, clip=0.5, compiles=True), 2)


@pytest.mark.parametrize("given", ["tuple", "iterator", "groups"])
@pytest.mark.parametrize("zero", [0, 1])
def test_experts_train_however_parameters_are_given(pool: Pool, given: str, zero: int) -> None:
    trained(pool, Case("mixtral", zero=zero, clip=0.5, given=given), 2)


# Of bfloat16 weights, by what DeepSpeed wraps their optimizer with.
WRAPPERS = {
    "FP16_UnfusedOptimizer": Case("mixtral", zero=0, clip=0.5, precision="bf16"),
    "FP16_Optimizer": Case("mixtral", zero=0, clip=0.5, precision="bf16", is_fused=True),
    "DeepSpeedZeroOptimizer": Case("mixtral", zero=2, clip=0.5, precision="bf16"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_gradient_norm_of_every_optimizer_counts_all_experts(pool: Pool, wrapper: str) -> None:
    for found in pool.run(ranks.train, WRAPPERS[wrapper], timeout=110):
        assert found["wrapper"] == wrapper
        assert found["norms"] == pytest.approx(found["expected"], rel=0.02)
        assert found["losses"] < 0.01 and found["weights"] < 0.02


@pytest.mark.sample(3)
@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_goes_on_where_it_was_saved(
    pool: Pool, tmp_path: Path, zero: int, layout: tuple[int, int, int]
) -> None:
    size, tp, ep = layout
    case = Case("deepseek_v3", zero=zero, tp=tp, ep=ep, clip=0.5)
    for found in pool.run(ranks.resume, case, str(tmp_path), ranks=size, timeout=110):
        losses, expected = found["losses"]
        assert found["loaded"] and losses == expected and found["weights"] == 0.0


def test_checkpoints_of_other_sizes_are_refused(pool: Pool, tmp_path: Path) -> None:
    case = Case("mixtral", zero=1)
    pool.run(ranks.resume, case, str(tmp_path), ranks=2)
    text = same_error(pool.run(ranks.load_error, replace(case, ep=4), str(tmp_path), ranks=4))
    assert text.startswith("ValueError: the checkpoint ") and (
        "with DeepSpeed's AutoEP over 2 ranks and 1 data-parallel replicas, expected with "
        "DeepSpeed's AutoEP over 4 ranks and 2 data-parallel replicas" in text
    )
    text = same_error(pool.run(ranks.load_error, replace(case, ep=0), str(tmp_path)))
    assert "over 2 ranks and 1 data-parallel replicas, expected without" in text
    folder = next(each for each in tmp_path.iterdir() if each.is_dir())
    with pytest.raises(ValueError, match="expected without DeepSpeed's AutoEP"):
        open_checkpoint(folder)


def test_full_weights_have_the_names_of_before(pool: Pool, tmp_path: Path) -> None:
    for found in pool.run(ranks.saved_for_inference, Case("qwen2_moe", zero=1), str(tmp_path)):
        assert found["difference"] == 0.0
        for text in found["refused"]:
            assert "experts that DeepSpeed's AutoEP has split" in text
            assert "call full_state_dict, or save_16bit_model of the engine" in text


BESIDE: dict[str, tuple[str, dict[str, Any], str]] = {
    "ZeRO 3": ("mixtral", {"zero_optimization": {"stage": 3}}, "zero_optimization.stage: got 3"),
    "offloading": (
        "mixtral",
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "offload",
    ),
    "sequences": (
        "mixtral",
        {"tensor_parallel": {"sequence_parallel": True}},
        "tensor_parallel.sequence_parallel: got true",
    ),
    "whole experts": (
        "mixtral",
        {"tensor_parallel": {"expert_partition": "experts"}},
        "tensor_parallel.expert_partition: got 'experts'",
    ),
    "one rank": ("mixtral", {"expert_parallel": {"autoep_size": 1}}, "autoep_size > 1"),
    "too many": ("mixtral", {"expert_parallel": {"autoep_size": 8}}, "autoep_size"),
    "no experts": ("olmo2", {}, "finds no blocks of experts"),
    "gradients that are not scattered": (
        "mixtral",
        {"zero_optimization": {"reduce_scatter": False, "contiguous_gradients": False}},
        "zero_optimization.reduce_scatter: got false beside expert_parallel, expected true, which "
        "DeepSpeed needs for experts\nzero_optimization.contiguous_gradients: got false",
    ),
    "gradients in float32": (
        "mixtral",
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        "data_types.grad_accum_dtype: got 'fp32' beside expert_parallel, expected that of the",
    ),
    "a universal checkpoint": (
        "mixtral",
        {"checkpoint": {"load_universal": True}},
        "checkpoint.load_universal: got true beside expert_parallel, expected false",
    ),
    "another preset": (
        "qwen3_moe",
        {"expert_parallel": {"preset_model": "deepseek_v3"}},
        "otherwise than the model does",
    ),
    "fewer experts of a token": (
        "mixtral",
        {"expert_parallel": {"top_k": 1}},
        "otherwise than the model does",
    ),
    "scores as they are": (
        "mixtral",
        {"expert_parallel": {"route_norm": False}},
        "otherwise than the model does",
    ),
    "a scale": (
        "deepseek_v3",
        {"expert_parallel": {"routed_scaling_factor": 2.0}},
        "otherwise than the model does",
    ),
    "shared experts left out": (
        "qwen2_moe",
        {"expert_parallel": {"has_shared_experts": False}},
        "otherwise than the model does",
    ),
    "another function": (
        "mixtral",
        {"expert_parallel": {"expert_activation": "swiglu_oai"}},
        "compute another function",
    ),
    "scores before": (
        "mixtral",
        {"expert_parallel": {"score_apply": "pre"}},
        "expert_parallel.score_apply: got 'pre'",
    ),
    "a misspelt key": (
        "mixtral",
        {"expert_parallel": {"preset_modell": "mixtral"}},
        "got the unknown key 'preset_modell', expected those of DeepSpeed's AutoEP; near ones are "
        "preset_model",
    ),
    "a text": (
        "mixtral",
        {"expert_parallel": {"enabled": "false"}},
        "expert_parallel.enabled: got 'false' (str), expected true or false",
    ),
    "DeepEP": ("mixtral", {"expert_parallel": {"comm_backend": "deepep"}}, "comm_backend"),
}


def test_what_does_not_go_beside_it_is_refused_before_anything_changes(pool: Pool) -> None:
    for what, (name, more, words) in BESIDE.items():
        found = pool.run(ranks.refused, Case(name, zero=1), more)
        text = same_error([text for text, _ in found])
        assert text.startswith("ValueError: ") and words in text, (what, text)
        assert all(as_before for _, as_before in found), what


def test_noise_of_the_router_is_refused(pool: Pool) -> None:
    found = pool.run(ranks.refused, Case("mixtral", zero=1, noise=0.1), {})
    text = same_error([text for text, _ in found])
    assert "got a model with router_jitter_noise 0.1, which AutoEP leaves out" in text


def test_experts_that_are_all_frozen_are_refused_where_deepspeed_needs_a_group(pool: Pool) -> None:
    found = pool.run(ranks.refused, Case("mixtral", zero=1, frozen="experts"), {})
    text = same_error([text for text, _ in found])
    assert "whose experts are all frozen with zero_optimization.stage 1" in text
    assert all(as_before for _, as_before in found)


def test_another_section_on_another_rank_is_refused(pool: Pool) -> None:
    case = Case("mixtral", zero=1)
    found = pool.run(ranks.refused_on_one_rank, case, {"autoep_size": 4}, ranks=4)
    assert "expert_parallel" in same_error(found)


def test_tp_groups_with_other_weights_are_refused_where_they_share_experts(pool: Pool) -> None:
    found = pool.run(ranks.refused_of_other_weights, Case("mixtral", zero=1, ep=4), ranks=4)
    assert "got TP groups with different weights of the experts" in same_error(found)


def test_few_key_value_heads_are_refused_by_name(pool: Pool) -> None:
    found = pool.run(ranks.refused, Case("mixtral", zero=1, tp=4), {}, ranks=4)
    text = same_error([text for text, _ in found])
    assert text.startswith("ValueError: expert_parallel: got 4 TP ranks") and "k_proj" in text
    assert all(as_before for _, as_before in found)


def test_models_that_are_sharded_and_optimizers_that_are_built_are_refused(pool: Pool) -> None:
    found = pool.run(ranks.refused_later, Case("mixtral", zero=1))
    again, without, sharded, built = (same_error([each[i] for each in found]) for i in range(4))
    for text in (again, without):
        assert "has split for an engine before" in text
    assert "expert_parallel: got a model that is sharded already" in sharded
    assert "initialize: optimizer: got an instance of SGD beside expert_parallel" in built


def test_the_registry_of_transformers_is_left_as_it_was(pool: Pool) -> None:
    assert pool.run(ranks.registry_is_left) == [True, True]
