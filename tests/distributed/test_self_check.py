# SPDX-License-Identifier: Apache-2.0
"""The self-check finds wrong plans, names what is wrong, and leaves no trace."""

from collections import namedtuple
from typing import Any

import pytest
import torch

from deepspeed_autotp.interop.transformers import output_tensors
from tests.distributed import self_check_ranks
from tests.support.handmade_model import PARTITION
from tests.support.loss_curves import worst_difference
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool


@pytest.mark.parametrize(
    ("family", "partition", "words"),
    [
        (
            "llama",
            self_check_ranks.Q_AS_ROW,
            [
                "the model cannot run with this plan",
                "model.layers.0.self_attn.q_proj (row; rule layer_specs[0] from partition_config)",
            ],
        ),
        (
            "llama",
            self_check_ranks.NO_OUTPUT,
            [
                "model.layers.0.self_attn.o_proj failed with RuntimeError",
                "model.layers.0.self_attn.v_proj (column; rule layer_specs[0]",
            ],
        ),
        (
            "qwen3",
            self_check_ranks.NO_NORM_SUM,
            [
                "the gradient of model.layers.1.self_attn.k_norm.weight (replicated; no rule)",
                "grad_allreduce",
            ],
        ),
    ],
)
def test_a_wrong_plan_is_named(
    pool: Pool, family: str, partition: dict[str, Any], words: list[str]
) -> None:
    text = same_error(pool.run(self_check_ranks.refused_plan, family, partition))
    assert [word for word in words if word not in text] == []


def test_a_fused_weight_sharded_as_one_piece_is_named(pool: Pool) -> None:
    specs = [{**spec} for spec in PARTITION["layer_specs"]]
    del specs[1]["shape"]
    text = same_error(
        pool.run(self_check_ranks.handmade_refusal, {**PARTITION, "layer_specs": specs}, True)
    )
    assert "the output of blocks.0.mlp.down differs from the full model's" in text
    assert "blocks.0.mlp.gate_up (column; rule layer_specs[1] from partition_config)" in text
    assert "attention" not in text


def test_the_tensors_of_a_dataclass_are_compared(pool: Pool) -> None:
    assert "the model's output has shape" in same_error(pool.run(self_check_ranks.refused_parts))


def test_a_self_check_that_sees_no_output_says_so(pool: Pool) -> None:
    warnings, others = pool.run(self_check_ranks.unseen_parts)
    assert [text.partition(",")[0] for text in warnings] == [
        "the self-check sees no tensor in the output of Wrapping"
    ]
    assert others == []


def test_tensors_of_an_output_are_found_in_any_usual_form() -> None:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    pair = namedtuple("pair", "left right")
    nested = self_check_ranks.Wrapped(a, (b, {"c": [c], "ids": torch.arange(3)}))  # type: ignore[arg-type]
    for output, expected in (
        (pair(a, b), [a, b]),
        (nested, [a, b, c]),
        (CausalLMOutputWithPast(loss=a, logits=b), [a, b]),
        (self_check_ranks.Wrapped, []),
        (self_check_ranks.Opaque(a), []),
        (None, []),
    ):
        found = output_tensors(output)
        assert len(found) == len(expected)
        assert all(x is y for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["unsharded", "forward", "backward"])
def test_a_rank_that_fails_in_the_self_check_fails_all(pool: Pool, rank: int, place: str) -> None:
    text = same_error(pool.run(self_check_ranks.fail_in_self_check, rank, place))
    assert f"on rank {rank} of 2: " in text and "out of luck" in text
    if place == "forward":
        assert "model.layers.1.mlp.down_proj failed" in text
    elif place == "backward":
        assert "the backward pass failed" in text


def test_ranks_keep_their_own_weights_when_the_plan_is_wrong(pool: Pool) -> None:
    assert "cannot run with this plan" in same_error(
        pool.run(self_check_ranks.refused_with_other_weights)
    )


def test_a_wrong_plan_goes_through_unchecked_when_asked(pool: Pool) -> None:
    for kinds in pool.run(self_check_ranks.unchecked_plan):
        assert kinds == ["replicated", "row"]


def test_a_self_check_that_is_asked_for_needs_inputs(pool: Pool) -> None:
    for text in (
        same_error(pool.run(self_check_ranks.insisted_without_inputs)),
        same_error(pool.run(self_check_ranks.handmade_refusal, PARTITION, False)),
    ):
        assert "tensor_parallel.self_check: got true, which needs a self-check, but" in text
        assert "the inputs of Handmade are not known; pass example_inputs to" in text
        assert "example_inputs" in text


def test_a_self_check_leaves_no_trace(pool: Pool) -> None:
    for left in pool.run(self_check_ranks.peculiar_model):
        assert left == {
            "calls": 0.0,
            "count": 0,
            "shapes": [],
            "last": False,
            "merged": False,
            "modes": [True, True, True, False],
            "gradients": [True, False, True, True, True, True],
            "grad": [True] * 6,
            "numbers": True,
            # Those that compare batches and optimizer steps, and those around sharded regions.
            "hooks": 9,
            "classes": ["Peculiar", "ColumnLinear", "RowLinear", "Linear"],
        }


def test_frozen_parameters_stay_frozen(pool: Pool) -> None:
    for before, after, touched in pool.run(self_check_ranks.frozen_model):
        assert before == after and not touched


@pytest.mark.parametrize("kept", ["buffer", "tensor", "another", "number"])
def test_a_number_that_acts_in_the_next_step_is_compared(pool: Pool, kept: str) -> None:
    for full, sharded in pool.run(self_check_ranks.running_number, kept):
        assert worst_difference(sharded, full) < 1e-5


def test_a_gradient_that_vanishes_is_no_difference(pool: Pool) -> None:
    assert pool.run(self_check_ranks.vanishing_gradient) == [True, True]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("unknown inputs", "WARNING: no self-check of the plan for Handmade"),
        (
            "wrong guess",
            "INFO: no self-check: LlamaForCausalLM does not run unsharded: ValueError: pixel",
        ),
        ("not finite", "its outputs are not finite"),
    ],
)
def test_a_self_check_that_cannot_run_is_no_error(pool: Pool, kind: str, words: str) -> None:
    first, *_ = pool.run(self_check_ranks.messages_of, kind)
    assert len([line for line in first if words in line]) == 1


def test_different_weights_are_shared_with_one_warning(pool: Pool) -> None:
    first, second = pool.run(self_check_ranks.messages_of, "other weights")
    assert [line for line in first if line.startswith("WARNING")] == [
        "WARNING: the ranks [0, 1] have different weights of LlamaForCausalLM; "
        "all take those of rank 0"
    ]
    assert second == []


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_model_of_ones_own_trains_as_in_one_process(pool: Pool, ranks: int) -> None:
    for got, expected in pool.run(self_check_ranks.handmade_curves, ranks=ranks):
        assert worst_difference(got, expected) < 1e-5
