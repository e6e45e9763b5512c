# SPDX-License-Identifier: Apache-2.0
"""A block whose plan is not the user's and is wrong stays whole, and the rest is cut."""

import pytest

from tests import leaving
from tests.pool import Pool
from tests.test_errors import same


@pytest.mark.parametrize(
    ("kind", "block", "words", "cut", "whole"),
    [
        ("fails", "model.layers.*.mlp", "down_proj failed with RuntimeError", "self_attn", "mlp"),
        ("differs", "model.layers.*.mlp", "the output of", "self_attn", "mlp"),
        ("gradient", "model.layers.*.self_attn", "the gradient of", "mlp", "self_attn"),
        ("head", "lm_head", "the model's output", "self_attn", "lm_head"),
    ],
)
def test_a_wrong_block_is_left_whole_with_one_warning(
    pool: Pool, kind: str, block: str, words: str, cut: str, whole: str
) -> None:
    first, *others = pool.run(leaving.train_left, kind)
    for left in (first, *others):
        assert left.apart < 1e-5
        assert [name for name in left.layers if whole in name] == []
        assert [name for name in left.layers if cut in name] != []
    assert len(first.warnings) == 1
    assert first.warnings[0].startswith(f"{block} stays whole on every rank: ")
    assert words in first.warnings[0]
    assert all(left.warnings == [] for left in others)


def test_a_model_of_which_nothing_can_be_cut_is_refused_unchanged(pool: Pool) -> None:
    text = same(pool.run(leaving.refuse_everything))
    assert "model.layers.0.mlp.down_proj" in text
    assert "and without that, the rules cut nothing of LlamaForCausalLM" in text
