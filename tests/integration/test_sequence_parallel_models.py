# SPDX-License-Identifier: Apache-2.0
"""Models whose blocks are unlike those of most decoders train with their tokens sharded."""

import pytest

from benchmarks.sweep import sweep_one
from tests.support.worker_pool import Pool

KINDS = {
    "axk1": "a row layer that splits its input makes the latent of its attention",
    "mamba": "layers of a mixer are individually sharded",
    "jetmoe": "experts are the only sharded blocks",
    "gpt_neox_japanese": "attention gives the bias of its row layer on",
    "openai-gpt": "a layer returns a list",
    "hrm_text": "layers run without gradients first, on all tokens",
    "cpmant": "attention is given its hidden states twice",
    "rwkv": "a block multiplies the output of its row layer by what it has of all tokens",
    "xlnet": "a block adds its input to the output of its row layer",
    "gemma4_text": "layers are given embeddings of each token",
    "gemma3n_text": "streams are the first dimension of the hidden states",
    "deepseek_v4": "streams are the third dimension of the hidden states",
    "zamba2": "layers are made of layers",
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("model_type", KINDS)
def test_losses_and_weights_equal_one_process(pool: Pool, model_type: str) -> None:
    row = sweep_one(pool, model_type, tp=2, clips=(1.0,), timeout=100, sequence_parallel=True)
    assert row.outcome == "ok", row.reason
    assert row.loss is not None and row.loss < 1e-5
    assert row.update is not None and row.update < 1e-3
