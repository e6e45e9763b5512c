# SPDX-License-Identifier: Apache-2.0
"""One dimension of a mesh for tensor parallelism, the others for DDP, fully_shard and HSDP: with
what else torch offers for a step, as one process in float64.

``make long`` has every pair of options in some run, and eight ranks.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.meshes_ranks import (
    compare,
    dropout_losses,
    right_after_all,
    rounded,
    save_wrapped,
)
from tests.support.mesh_runs import MATRIX, QUICK, MeshRun, runs_of_pairs
from tests.support.worker_pool import Pool

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
# How the table of the page calls what has another name in MATRIX.
CALLED = {
    "fsdp": "fully_shard",
    "whole": "of the model alone",
    "reshard": "reshard_after_forward",
    "offload": "CPUOffloadPolicy",
    "wrapper": "apply_activation_checkpointing",
    "not reentrant": "reentrant or not",
    "blocks": "layer.compile()",
    "replaced blocks": "another module in their place",
    "model": "of the model",
    "ours": "deepspeed_autotp.clip_grad_norm_",
    "torch": "torch.nn.utils.clip_grad_norm_",
    "largest": "of any order",
    "value": "clip_grad_value_",
    "AdamW foreach": "foreach",
    "AdamW fused": "fused",
    "each": "reduced in each backward",
    "last": "in the last",
    "half": "some",
    "llama": "one key head",
    "gpt2": "uneven heads and vocabulary",
    "qwen3": "q/k norms",
}
CLOSE = 1e-9
AT_ONCE = 3  # runs of one job of the pool
ALL = runs_of_pairs()
COMPILED = MeshRun(family="qwen3", compiled="model", checkpoint="wrapper", clip="torch")
ON_EIGHT = [
    MeshRun(way="hsdp", reshard=True, clip="torch"),
    MeshRun(family="gpt2", reshard=False, accumulate="last", optimizer="AdamW fused"),
    MeshRun(family="experts", tp=4, way="hsdp", checkpoint="wrapper"),
]


def check(pool: Pool, runs: list[MeshRun], *, ranks: int = 4, timeout: float = 120.0) -> None:
    for found in pool.run(compare, runs, ranks=ranks, timeout=timeout):
        for run, each in zip(runs, found, strict=True):
            assert not isinstance(each, str), (run.label, each)
            assert max(each.values()) < CLOSE, (run.label, each)


def test_the_table_of_the_page_has_every_option_of_the_matrix() -> None:
    text = PAGE.read_text().partition("| option | values |")[2].partition("\n\n")[0].lower()
    named = [value for values in MATRIX.values() for value in values if isinstance(value, str)]
    for name in [*filter(None, named), "whole", "reshard", "offload"]:
        assert CALLED.get(name, name).lower() in text, name


@pytest.mark.parametrize("part", [QUICK[:2], QUICK[2:]], ids=["1", "2"])
def test_losses_norms_and_weights_are_those_of_one_process(pool: Pool, part: list[MeshRun]) -> None:
    check(pool, part)


@pytest.mark.long
def test_a_compiled_model_trains_as_one_process(pool: Pool) -> None:
    check(pool, [COMPILED], timeout=180)


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, len(ALL), AT_ONCE))
def test_every_pair_of_options_trains_as_one_process(pool: Pool, first: int) -> None:
    check(pool, ALL[first : first + AT_ONCE], timeout=600)


@pytest.fixture
def eight() -> Iterator[Pool]:
    workers = Pool(8)
    yield workers
    workers.close()


@pytest.mark.long
def test_three_dimensions_on_eight_ranks_train_as_one_process(eight: Pool) -> None:
    check(eight, ON_EIGHT, ranks=8, timeout=400)


def test_each_replica_drops_as_alone_with_its_seed(pool: Pool) -> None:
    """And recomputations of activations drop the same."""
    beside = pool.run(dropout_losses, "", ranks=4)
    for seed in range(2):
        alone = pool.run(dropout_losses, "", seed, ranks=2)
        ranks = beside[2 * seed : 2 * seed + 2]
        assert [losses[0] for losses in ranks] == pytest.approx([alone[0][0]] * 2, rel=CLOSE)
    assert beside[0][0] != pytest.approx(beside[2][0], rel=1e-6)
    for losses, expected in zip(pool.run(dropout_losses, "wrapper", ranks=4), beside, strict=True):
        assert losses == pytest.approx(expected, rel=CLOSE)


def test_mixed_precision_rounds_as_much_as_that_of_fully_shard_alone(pool: Pool) -> None:
    expected, alone = pool.run(rounded, 1, ranks=2)[0]
    for _, beside in pool.run(rounded, 2, ranks=4):
        for got in (alone, beside):
            assert got.keys() == expected.keys()
        assert _error(beside, expected) < 1.3 * _error(alone, expected)


def _error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The relative error over all weights."""
    apart = sum(float((got[n] - t).square().sum()) for n, t in expected.items())
    return (apart / sum(float(t.square().sum()) for t in expected.values())) ** 0.5


def test_what_wrapped_blocks_hold_is_saved_under_their_own_names(
    pool: Pool, tmp_path: Path
) -> None:
    names, full = pool.run(save_wrapped, str(tmp_path))[0]
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == full.keys() == set(names)
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert all(torch.equal(saved[name], tensor) for name, tensor in full.items())


def test_other_forms_of_fully_shard_train_as_one_process(pool: Pool) -> None:
    for found in pool.run(right_after_all, ranks=4):
        assert max(found.values()) < CLOSE, found
