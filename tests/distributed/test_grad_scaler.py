# SPDX-License-Identifier: Apache-2.0
"""Loss scaling in float16: the ranks of a TP group take one process's decisions."""

import pytest
import torch

import deepspeed_autotp
from deepspeed_autotp.interop.torch_private import found_inf_per_device
from tests.distributed import grad_scaler_ranks
from tests.support.worker_pool import Pool


@pytest.mark.parametrize("kind", ["plain", "clipped", "fused"])
def test_an_infinite_gradient_of_one_rank_is_one_of_all(pool: Pool, kind: str) -> None:
    for found in pool.run(grad_scaler_ranks.against_one_process, kind, timeout=100):
        scales, expected = found["scales"]
        assert scales == expected and len(set(scales)) > 5
        moved, expected = found["moved"]
        assert moved == expected
        assert [step for step in range(30) if not moved[step]] == list(grad_scaler_ranks.HIT)
        assert found["losses"] < 2e-2


def test_a_rank_without_gradients_takes_part(pool: Pool) -> None:
    for before, after, moved in pool.run(grad_scaler_ranks.without_gradients):
        assert after == before / 2 and not moved


def test_an_unsharded_model_is_scaled_as_by_torch(pool: Pool) -> None:
    first, second = pool.run(grad_scaler_ranks.unsharded, ranks=1)[0]
    assert torch.equal(first, second)


def test_another_torch_is_told_what_is_missing() -> None:
    class Bare:
        pass

    bare, optimizer = Bare(), torch.optim.SGD([torch.ones(1)])
    with pytest.raises(
        RuntimeError, match=r"_found_inf_per_device is missing: tested with torch 2"
    ):
        found_inf_per_device(bare, optimizer)  # type: ignore[arg-type]


def test_it_is_one_of_torchs_scalers() -> None:
    assert issubclass(deepspeed_autotp.GradScaler, torch.amp.GradScaler)
