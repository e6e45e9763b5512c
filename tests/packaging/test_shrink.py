# SPDX-License-Identifier: Apache-2.0
"""The sweep over architectures: what it shrinks, and how it judges a sharded run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from benchmarks.shrink import MODEL_TYPES, batch, build, config
from benchmarks.sizes import EXCEPTIONS, INPUTS, UNTRAINABLE
from benchmarks.sweep import Row, group_reasons, judge, sweep_one, totals
from benchmarks.sweep_rank import Measured, worst_update
from tests.support.worker_pool import Pool


def test_every_exception_is_about_a_model_type_of_transformers() -> None:
    named = {*EXCEPTIONS, *INPUTS, *UNTRAINABLE}
    assert named <= set(MODEL_TYPES)


def test_a_hybrid_model_keeps_one_layer_of_each_kind() -> None:
    shrunk = config("qwen3_next")
    assert shrunk.layer_types == ["linear_attention", "full_attention"]
    assert shrunk.num_hidden_layers == 2


def test_a_configuration_of_parts_is_shrunk_in_every_part() -> None:
    shrunk = config("gemma3")
    assert shrunk.text_config.hidden_size == 64
    assert shrunk.vision_config.hidden_size == 32


def test_tokens_that_stand_for_images_are_inside_the_vocabulary_and_never_drawn() -> None:
    shrunk = config("gemma3")
    assert shrunk.image_token_id < shrunk.text_config.vocab_size
    assert int(batch("gemma3", 0)["input_ids"].max()) < shrunk.image_token_id


def first_loss(model_type: str) -> tuple[int, float]:
    """Parameters of a new model and its loss; runs in a worker."""
    model = build(model_type)
    loss = model(**batch(model_type, 0)).loss
    loss.backward()
    return sum(p.numel() for p in model.parameters()), float(loss.detach())


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "bart", "musicgen", "reformer"])
def test_a_shrunken_model_is_small_and_the_same_on_every_rank(pool: Pool, model_type: str) -> None:
    first, second = pool.run(first_loss, model_type, ranks=2, timeout=100)
    assert first == second
    size, loss = first
    assert size < 500_000
    assert math.isfinite(loss)


def test_the_sweep_finds_a_llama_equal_and_half_as_large_on_each_rank(pool: Pool) -> None:
    row = sweep_one(pool, "llama", tp=2, clips=(0.0, 1.0), timeout=100)
    assert row.outcome == "ok", row.reason
    assert row.loss is not None and row.loss < 1e-5
    assert row.share is not None and 0.5 <= row.share < 0.51
    # Forward: four row layers, the embedding, the loss. Backward: four column inputs, the head's.
    assert (row.forward, row.backward) == (6, 5)


def test_the_sweep_says_why_one_process_cannot_train_a_model(pool: Pool) -> None:
    row = sweep_one(pool, "gemma4_assistant", tp=2, clips=(0.0,), timeout=100)
    assert row.outcome == "unable"
    assert UNTRAINABLE["gemma4_assistant"] in row.reason


@pytest.mark.parametrize("figure", ["losses", "norms", "updates"])
@pytest.mark.parametrize("value", [0.05, math.inf])
def test_a_difference_on_one_rank_and_at_one_clipping_norm_is_found(
    figure: str, value: float
) -> None:
    even = {0.0: 0.0, 1.0: 0.0}
    good = Measured("trained", losses=even, norms=even, updates=even, parameters=10, local=5)
    changes: dict[str, Any] = {figure: {0.0: 0.0, 1.0: value}}
    bad = dataclasses.replace(good, **changes)
    assert judge("llama", [good, good]).outcome == "ok"
    assert judge("llama", [good, bad]).outcome == "differs"


def test_ranks_that_disagree_are_a_crash() -> None:
    row = judge("llama", [Measured("refused", "no"), Measured("trained")])
    assert row.outcome == "crashed"


def test_a_weight_that_goes_elsewhere_is_found_in_what_it_moved() -> None:
    start = {"w": torch.zeros(4), "v": torch.zeros(2)}
    end = {"w": torch.ones(4), "v": torch.ones(2)}
    got = {"w": torch.tensor([1.0, 1.0, 1.0, 0.5]), "v": torch.ones(2)}
    assert worst_update(got, start, end) == pytest.approx(0.25)


def test_reasons_are_grouped_without_the_names_in_them() -> None:
    rows = [
        Row("a", "refused", "ValueError: tp_plan['x.y']: 'moe' is new"),
        Row("b", "refused", "ValueError: tp_plan['z']: 'mla' is new"),
        Row("c", "hang", "rank 1 did not answer within 60 s"),
    ]
    grouped = group_reasons(rows)
    assert [names for _, names in grouped] == [["a", "b"], ["c"]]


def test_totals_count_only_what_one_process_trains() -> None:
    rows = [
        Row("a", "ok", "", loss=1e-7, share=0.5),
        Row("b", "ok", "", loss=1e-4, share=0.7),
        Row("c", "unable", "no labels"),
    ]
    first, counts, shares = totals(rows, tp=2)
    assert first.startswith("TP 2: 2 of 2 ")
    assert "1 unable" in counts and "0 hang" in counts
    assert "mean 0.600" in shares and "1 of 2" in shares
