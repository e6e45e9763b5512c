# SPDX-License-Identifier: Apache-2.0
"""Dropout is independent on every rank inside of sharded regions, and equal outside of them."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import dropout_ranks
from tests.distributed.dropout_ranks import Masks
from tests.support.dropout_model import RATE
from tests.support.worker_pool import Pool

# Heads and ranks: equal numbers of heads, and numbers that differ.
CASES = [(4, 2), (5, 2), (4, 3)]
SHARDED = ("attention_dropout", "inner_dropout")


def is_sharded(name: str) -> bool:
    return name.endswith(SHARDED)


def units(mask: Tensor, name: str) -> list[Tensor]:
    """Masks of each head or feature."""
    return list(mask.unbind(1 if name.endswith("attention_dropout") else -1))


def assert_independent(found: list[Tensor], name: str) -> None:
    """No head of one rank has the mask of a head of another. Of features, runs of eight have not:
    a few elements may well be equal by chance."""
    for one, other in itertools.combinations(found, 2):
        if name.endswith("attention_dropout"):
            pairs = itertools.product(units(one, name), units(other, name))
            assert not any(torch.equal(a, b) for a, b in pairs), name
        else:
            assert not torch.equal(one[..., :8], other[..., :8]), name


def assert_right(ranks: list[Masks], *, tokens_sharded: bool = False) -> None:
    """What is drawn in sharded regions differs, what is drawn elsewhere is equal."""
    for name in ranks[0]:
        for call in zip(*(masks[name] for masks in ranks), strict=True):
            if is_sharded(name):
                assert_independent(list(call), name)
            elif tokens_sharded and name != "embedding_dropout":
                rows = min(mask.shape[-2] for mask in call)
                for one, other in itertools.combinations(call, 2):
                    assert not torch.equal(one[..., :rows, :], other[..., :rows, :]), name
            else:
                assert all(torch.equal(mask, call[0]) for mask in call), name


@pytest.mark.parametrize(("heads", "ranks"), CASES)
@pytest.mark.parametrize("sequence", [False, True], ids=["tokens full", "tokens sharded"])
def test_masks_of_different_heads_differ_and_masks_outside_are_equal(
    pool: Pool, heads: int, ranks: int, sequence: bool
) -> None:
    found = pool.run(dropout_ranks.masks, heads, sequence, None, 2, ranks=ranks)
    for steps in zip(*(masks for masks, _ in found), strict=True):
        assert_right(list(steps), tokens_sharded=sequence)
    assert len({after for _, after in found}) == 1
    for masks, _ in found:
        first, second = masks
        for name in first:  # other masks in every step and in every layer
            assert not torch.equal(first[name][0], second[name][0])
        for name in (n for n in first if n.startswith("blocks.0")):
            assert not torch.equal(first[name][0], first[name.replace("0", "1", 1)][0])


@pytest.mark.sample(2)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sequence", [False, True], ids=["tokens full", "tokens sharded"])
@pytest.mark.parametrize(("heads", "ranks"), CASES[:2])
def test_a_recomputation_draws_the_same_masks(
    pool: Pool, heads: int, ranks: int, sequence: bool, reentrant: bool
) -> None:
    for (masks,), _ in pool.run(dropout_ranks.masks, heads, sequence, reentrant, 1, ranks=ranks):
        for name, seen in masks.items():
            if name != "embedding_dropout":
                assert len(seen) == 2 and torch.equal(*seen), name


@pytest.mark.parametrize(("heads", "ranks"), CASES)
@pytest.mark.parametrize("sequence", [False, True], ids=["tokens full", "tokens sharded"])
def test_checkpoints_change_neither_gradients_nor_the_rng_state(
    pool: Pool, heads: int, ranks: int, sequence: bool
) -> None:
    behind = set()
    for (loss, grads, after), *others in pool.run(
        dropout_ranks.gradients, heads, sequence, ranks=ranks
    ):
        behind.add(after)
        for other_loss, other_grads, other_after in others:
            assert other_loss == loss and other_after == after
            for one, other in zip(grads, other_grads, strict=True):
                assert torch.allclose(one, other, rtol=0, atol=1e-6)
    assert len(behind) == 1


@pytest.mark.parametrize(
    ("steps", "heads", "ranks", "sequence", "reentrant", "compiled"),
    [
        (50, 5, 2, True, False, False),
        pytest.param(200, 4, 3, False, True, False, marks=pytest.mark.long),
        pytest.param(200, 4, 3, False, False, False, marks=pytest.mark.long),
        pytest.param(200, 5, 2, True, False, False, marks=pytest.mark.long),
        pytest.param(200, 4, 2, False, False, True, marks=pytest.mark.long),
    ],
)
def test_replicas_stay_equal_over_many_steps_with_all_dropouts(
    pool: Pool,
    steps: int,
    heads: int,
    ranks: int,
    sequence: bool,
    reentrant: bool | None,
    compiled: bool,
) -> None:
    job = (dropout_ranks.long_run, steps, heads, sequence, reentrant, compiled)
    found = pool.run(*job, ranks=ranks, timeout=110)
    assert [said for said, _, _ in found] == ["all equal"] * ranks
    assert len({after for _, after, _ in found}) == 1
    assert all(losses == found[0][2] for _, _, losses in found)
    assert len(set(found[0][2])) > 0.95 * steps


@pytest.mark.sample(2)
@pytest.mark.parametrize(("heads", "ranks"), CASES[:2])
def test_a_compiled_model_draws_what_the_model_draws(pool: Pool, heads: int, ranks: int) -> None:
    found = pool.run(dropout_ranks.compiled_masks, heads, ranks=ranks, timeout=110)
    for differences, after, breaks in found:
        assert max(float(d.abs().max()) for d in differences) < 1e-6
        assert torch.equal(after, found[0][1]) and breaks > 0


def test_the_variance_of_outputs_is_that_of_one_process(pool: Pool) -> None:
    seeds = 1500
    found = pool.run(dropout_ranks.outputs, 4, seeds, timeout=110)
    for (mean, variance), (own_mean, own_variance), dropped in found:
        # Of a mean over 2 heads of a rank, 25 weights each and all seeds.
        assert abs(dropped - RATE) < 4 * (RATE * (1 - RATE) / (50 * seeds)) ** 0.5
        error = (variance / seeds + own_variance / seeds).sqrt()
        assert float(((mean - own_mean).abs() / error).max()) < 5
        # Equal masks of both ranks would double it; the sampling error of a ratio is 4 to 5 %.
        ratio = own_variance / variance
        assert float(ratio.min()) > 0.8 and float(ratio.max()) < 1.25
        assert 0.93 < float(ratio.mean()) < 1.07


@pytest.mark.sample(2)
@pytest.mark.parametrize(("heads", "ranks"), CASES[:2])
@pytest.mark.parametrize(
    "where", ["blocks.0.attention.attention_dropout", "blocks.1.mlp.inner_dropout"]
)
@pytest.mark.parametrize("sequence", [False, True], ids=["tokens full", "tokens sharded"])
def test_the_step_after_an_exception_is_right(
    pool: Pool, heads: int, ranks: int, where: str, sequence: bool
) -> None:
    found = pool.run(dropout_ranks.interrupted, heads, sequence, where, ranks=ranks)
    assert len({after for after, _, _ in found}) == 1 and len({last for *_, last in found}) == 1
    for steps in zip(*(masks for _, masks, _ in found), strict=True):
        assert_right(list(steps), tokens_sharded=sequence)


def test_the_step_after_a_failed_recomputation_is_right(pool: Pool) -> None:
    found = pool.run(dropout_ranks.fails_in_recomputation, 5)
    assert len({after for after, _ in found}) == 1
    for steps in zip(*(masks for _, masks in found), strict=True):
        assert_right(list(steps))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_dropout_that_nothing_declares_is_found_in_its_first_call(
    pool: Pool, late: bool, checkpointed: bool
) -> None:
    """Where it is switched on later, the masks are independent from the next call on."""
    found = pool.run(dropout_ranks.undeclared, late, checkpointed)
    assert [len(steps) for steps in found] == [2 if late else 3] * 2
    for steps in zip(*(steps[late:] for steps in found), strict=True):
        assert_independent([masks[0] for masks in steps], "inner_dropout")
    for masks in (masks for steps in found for masks in steps):
        assert len(masks) == (4 if checkpointed else 2)
        if checkpointed:  # forward of both blocks, backward of both
            assert torch.equal(masks[0], masks[3]) and torch.equal(masks[1], masks[2])


@pytest.mark.parametrize(("heads", "ranks"), CASES[:2])
def test_a_model_without_dropout_leaves_the_rng_state_alone(
    pool: Pool, heads: int, ranks: int
) -> None:
    assert pool.run(dropout_ranks.nothing_drawn, heads, ranks=ranks) == [[True] * 3] * ranks


def test_evaluation_leaves_the_rng_state_alone(pool: Pool) -> None:
    assert pool.run(dropout_ranks.evaluated, 5) == [True] * 2


@pytest.mark.parametrize("sequence", [False, True], ids=["tokens full", "tokens sharded"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96}],
    ids=["even", "uneven"],
)
def test_adapters_drop_full_inputs_alike_and_sharded_ones_not(
    pool: Pool, changes: dict[str, Any], sequence: bool
) -> None:
    (said, first), (other, second) = pool.run(dropout_ranks.adapters, changes, sequence)
    assert (said, other) == ("all equal", "all equal")
    assert first.keys() == second.keys() and len(first) == 10
    for name, (mask,) in first.items():
        if "o_proj" in name or "down_proj" in name:
            width = min(mask.shape[-1], second[name][0].shape[-1])
            assert not torch.equal(mask[..., :width], second[name][0][..., :width]), name
        else:
            assert torch.equal(mask, second[name][0]), name


def test_positions_of_deberta_are_dropped_alike(pool: Pool) -> None:
    (said, first, heads), (other, second, others) = pool.run(dropout_ranks.positions)
    assert (said, other) == ("all equal", "all equal")
    assert torch.equal(first[0], second[0])
    assert_independent([heads[0].squeeze(), others[0].squeeze()], "attention_dropout")


def test_a_checkpointed_function_that_calls_layers_itself_is_refused(pool: Pool) -> None:
    for dropping, plain, alone in pool.run(dropout_ranks.by_parts):
        # The self-check sees it before anything is sharded.
        assert dropping.startswith("ValueError: the model cannot run with this plan: the backward ")
        assert alone.startswith("RuntimeError: a sharded layer of a model with dropout was ")
        for text in (dropping, alone):
            assert "let torch.utils.checkpoint take modules" in text
        assert plain == "nothing"


def test_a_block_that_runs_within_a_region_has_its_own(pool: Pool) -> None:
    found = pool.run(dropout_ranks.nested)
    assert [said for said, *_ in found] == ["all equal"] * 2
    assert_independent([outer for _, outer, _, _ in found], "inner_dropout")
    assert_independent([inner for _, _, inner, _ in found], "inner_dropout")
    assert torch.equal(found[0][3], found[1][3])


def test_experts_that_draw_in_their_own_forward_are_refused(pool: Pool) -> None:
    for dropping, plain in pool.run(dropout_ranks.experts):
        assert dropping.startswith("RuntimeError: experts whose features are sharded drew random")
        assert dropping.endswith("leave them replicated with partition_type 'skip'")
        assert plain == "nothing"
