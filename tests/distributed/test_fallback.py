# SPDX-License-Identifier: Apache-2.0
"""Of a block whose plan is not the user's and is wrong the layers are sharded individually, or it
falls back to replicated; the rest is sharded as planned."""

import pytest

from deepspeed_autotp.self_check.compare import covers
from tests.distributed import fallback_ranks
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool


@pytest.mark.parametrize(
    ("kind", "block", "words"),
    [
        ("fails", "model.layers.*.mlp", "down_proj failed with RuntimeError"),
        ("differs", "model.layers.*.mlp", "the output of"),
        ("gradient", "model.layers.*.self_attn", "the gradient of"),
        ("head", "lm_head", "the model cannot run with this plan: the model failed"),
    ],
)
def test_the_layers_of_a_wrong_block_are_sharded_individually(
    pool: Pool, kind: str, block: str, words: str
) -> None:
    first, *others = pool.run(fallback_ranks.train_with_fallback, kind)
    for outcome in (first, *others):
        assert outcome.apart < 1e-5
        within = {name for name in outcome.layers if covers([block], f"{name}.")}
        assert within != set()
        assert within | {"lm_head"} == outcome.individual
    assert len(first.warnings) == 1
    assert first.warnings[0].startswith(f"{block} is sharded layer by layer, with ")
    assert words in first.warnings[0]
    assert all(outcome.warnings == [] for outcome in others)


def test_a_wrong_block_without_layers_falls_back_to_replicated_with_a_warning(pool: Pool) -> None:
    first, *others = pool.run(fallback_ranks.train_with_fallback, "experts")
    for outcome in (first, *others):
        assert outcome.apart < 1e-5
        assert [name for name in outcome.layers if "mlp" in name] == []
        assert [name for name in outcome.layers if "self_attn" in name] != []
    block, little = first.warnings
    assert block.startswith("model.layers.*.mlp stays replicated: ")
    assert little.startswith("MixtralForCausalLM: a rank holds 0.9")
    assert "model.layers.*.mlp.experts.gate_up_proj (0.5" in little
    assert all(outcome.warnings == [] for outcome in others)


def test_a_model_of_which_nothing_can_be_sharded_is_refused_unchanged(pool: Pool) -> None:
    text = same_error(pool.run(fallback_ranks.refuse_everything))
    assert "model.layers.0.mlp.experts" in text
    assert "and without that, the rules shard nothing of MixtralForCausalLM" in text
