# SPDX-License-Identifier: Apache-2.0
"""An Accelerate loop without a Trainer trains through us after install()."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engine_config import accelerate_config
from tests.support.log_records import logged_warnings
from tests.support.loss_curves import worst_difference
from tests.support.small_models import build
from tests.support.trainer_script import Examples, saved_loss
from tests.support.worker_pool import Pool

STEPS = 4


def loop(tp: int, zero: int, folder: str) -> tuple[list[float], list[float], list[float]]:
    """Losses and gradient norms of every step, and the losses after a load of step 2's state."""
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState

    import deepspeed_autotp

    deepspeed_autotp.install()
    PartialState(cpu=True)  # what TrainingArguments(use_cpu=True) does; a GPU box needs none of it
    plugin = DeepSpeedPlugin(hf_ds_config=accelerate_config(tp, zero))
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = build("llama", tied=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(Examples(32, 1), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = [batch for batch, _ in zip(loader, range(STEPS), strict=False)]

    losses, norms = [], []

    def step(batch: dict[str, Any]) -> None:
        loss = model(**batch).loss
        accelerator.backward(loss)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.gather(loss.detach()).mean()))

    for number, batch in enumerate(batches):
        if number == 2:
            accelerator.save_state(f"{folder}/state")
        step(batch)
    weights = accelerator.get_state_dict(model)
    plain = accelerator.unwrap_model(model)
    plain.save_pretrained(
        f"{folder}/final", state_dict=weights, is_main_process=accelerator.is_main_process
    )
    accelerator.load_state(f"{folder}/state")
    for batch in batches[2:]:
        step(batch)
    deepspeed_autotp.uninstall()
    return losses[:STEPS], norms[:STEPS], losses[STEPS:]


class Sums(torch.nn.Module):
    """Takes what nothing but its data tells: features, and a count of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 1)

    def forward(self, features: torch.Tensor, count: int, wanted: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.relu(self.up(features[:, : int(count[0])])))
        return (y.squeeze(-1) - wanted).square().mean()


def first_batch() -> tuple[list[str], float, bool]:
    """Warnings of a model whose inputs are known from its data alone, the distance of its losses
    from those of one process, and whether ``uninstall`` leaves Accelerate as it was."""
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState

    import deepspeed_autotp

    before = Accelerator.prepare_data_loader
    deepspeed_autotp.install()
    deepspeed_autotp.install()
    PartialState(cpu=True)
    rows = [
        {"features": torch.arange(6.0) * (n % 3), "count": 6, "wanted": float(n)} for n in range(16)
    ]
    losses = []
    with logged_warnings() as warnings:
        for sharded in (False, True):
            torch.manual_seed(0)
            model: Any = Sums()
            optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3)
            loader: Any = torch.utils.data.DataLoader(rows, batch_size=4)
            if sharded:
                config = accelerate_config(2, 1) | {"gradient_clipping": 0.0}
                plugin = DeepSpeedPlugin(hf_ds_config=config)
                accelerator = Accelerator(deepspeed_plugin=plugin)
                model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
                assert deepspeed_autotp.tensor_parallel(model).plan.ranks == 2
            for batch in loader:
                loss = model(**batch)
                accelerator.backward(loss) if sharded else loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
    deepspeed_autotp.uninstall()
    half = len(losses) // 2
    apart = worst_difference(losses[half:], losses[:half])
    return list(warnings), apart, Accelerator.prepare_data_loader is before


def test_the_first_batch_of_prepared_data_is_what_the_self_check_runs(pool: Pool) -> None:
    for warnings, apart, as_before in pool.run(first_batch):
        assert not any("self-check" in text for text in warnings), warnings
        assert apart < 1e-5 and as_before


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.long), 3])
def test_loop_at_tp2_dp2_equals_the_loop_at_dp2(pool: Pool, zero: int, tmp_path: Path) -> None:
    sharded, plain = str(tmp_path / "sharded"), str(tmp_path / "plain")
    losses, norms, loaded = pool.run(loop, 2, zero, sharded, ranks=4)[0]
    expected_losses, expected_norms, _ = pool.run(loop, 1, zero, plain, ranks=2)[0]
    assert worst_difference(losses, expected_losses) <= 1e-4
    assert worst_difference(norms, expected_norms) <= 1e-4
    assert loaded == losses[2:]
    (found,) = pool.run(saved_loss, f"{sharded}/final", ranks=1)
    (expected,) = pool.run(saved_loss, f"{plain}/final", ranks=1)
    assert abs(found - expected) <= 1e-4 * expected


def scaled() -> tuple[float, bool]:
    """The scale after a step through Accelerate with an infinite gradient on rank 1, and whether
    Accelerate says that it was skipped."""
    import torch.distributed as dist
    from accelerate import Accelerator

    import deepspeed_autotp

    accelerator = Accelerator(cpu=True)
    model = deepspeed_autotp.parallelize(build("llama", tied=False), tp_size=2)
    scaler = deepspeed_autotp.GradScaler("cpu", init_scale=2.0**10, model=model)
    accelerator.scaler = scaler
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    ids = torch.arange(12).view(1, 12)
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    if dist.get_rank() == 1:
        weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        weight.grad = torch.full_like(weight, torch.inf)
    optimizer.step()
    return float(scaler.get_scale()), bool(optimizer.step_was_skipped)


def test_a_scaler_of_ours_goes_into_accelerate(pool: Pool) -> None:
    assert pool.run(scaled) == [(2.0**9, True)] * 2
