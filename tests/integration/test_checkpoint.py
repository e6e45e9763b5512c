# SPDX-License-Identifier: Apache-2.0
"""A run that is saved and loaded at the same TP size goes on as if it had not stopped.

Other sizes are in test_resume.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed_autotp._core import Plan
from deepspeed_autotp.checkpoint.metadata import check_metadata, read_metadata, write_metadata
from tests.support.core_llama import llama, preset
from tests.support.engine_config import Setting, engine_config
from tests.support.loss_curves import train_engine
from tests.support.small_models import build
from tests.support.worker_pool import Pool

STEPS = 2
ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.01}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 6}}


def make_engine(setting: Setting, *, tied: bool, seed: int, configured: bool) -> Any:
    """An engine whose optimizer is the user's, or made by DeepSpeed with a schedule."""
    import deepspeed_autotp

    model = build("llama", tied=tied, seed=seed)
    config = engine_config(setting)
    if configured:
        config |= {"optimizer": ADAM, "scheduler": WARMUP}
        engine, *_ = deepspeed_autotp.initialize(
            model=model, model_parameters=model.parameters(), config=config
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def stop_and_go_on(
    setting: Setting, tied: bool, configured: bool, folder: str
) -> tuple[list[float], list[float], bool]:
    """Losses after the checkpoint, of the run that went on and of the one that was loaded into
    other weights; and whether both end with the same weights."""
    import deepspeed_autotp

    engine = make_engine(setting, tied=tied, seed=0, configured=configured)
    train_engine(engine, tp=setting.tp, steps=STEPS)
    assert engine.save_checkpoint(folder, client_state={"note": "kept"})
    went_on = train_engine(engine, tp=setting.tp, first=STEPS, steps=STEPS)
    ended = deepspeed_autotp.full_state_dict(engine)
    engine.destroy()

    engine = make_engine(setting, tied=tied, seed=1, configured=configured)
    path, client = engine.load_checkpoint(folder)
    assert path is not None
    assert client["note"] == "kept"
    assert engine.global_steps == STEPS
    loaded = train_engine(engine, tp=setting.tp, first=STEPS, steps=STEPS)
    deepspeed_autotp.check_replicas(engine)
    after = deepspeed_autotp.full_state_dict(engine)
    engine.destroy()
    return went_on, loaded, all(torch.equal(ended[name], after[name]) for name in ended)


@pytest.mark.sample(3)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("tied", "configured"),
    [(False, False), (True, True)],
    ids=["untied, own optimizer", "tied, configured optimizer and schedule"],
)
def test_loaded_run_goes_on_as_the_saved_one(
    pool: Pool, zero: int, tied: bool, configured: bool, tmp_path: Path
) -> None:
    setting = Setting(tp=2, zero=zero, clip=1.0)
    args = (setting, tied, configured, str(tmp_path))
    for went_on, loaded, same in pool.run(stop_and_go_on, *args, ranks=4):
        assert loaded == went_on
        assert same


@pytest.mark.sample(2)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_loaded_sixteen_bit_run_goes_on_as_the_saved_one(
    pool: Pool, zero: int, tmp_path: Path
) -> None:
    setting = Setting(tp=2, zero=zero, clip=1.0, precision="bf16")
    for went_on, loaded, same in pool.run(
        stop_and_go_on, setting, False, False, str(tmp_path), ranks=4
    ):
        assert loaded == went_on
        assert same


def engine_with(setting: Setting, section: dict[str, Any]) -> Any:
    import deepspeed_autotp

    model = build("llama", tied=False)
    config = engine_config(setting)
    config["tensor_parallel"] |= section
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)[0]


def save(setting: Setting, section: dict[str, Any], folder: str) -> None:
    engine_with(setting, section).save_checkpoint(folder)


def refused_load(setting: Setting, section: dict[str, Any], folder: str) -> str:
    """What loading raises; the weights are as they were."""
    import deepspeed_autotp

    engine = engine_with(setting, section)
    before = deepspeed_autotp.full_state_dict(engine)
    with pytest.raises(ValueError) as caught:
        engine.load_checkpoint(folder)
    after = deepspeed_autotp.full_state_dict(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return str(caught.value)


def forget_layout(folder: Path) -> None:
    """Leave of the metadata what its second version had."""
    file = folder / "global_step0" / "tensor_parallel.json"
    metadata = json.loads(file.read_text())
    kept = {"version": 2, "ranks": metadata["ranks"], "layout": metadata["layout"]}
    file.write_text(json.dumps(kept))


def test_a_checkpoint_of_another_tp_size_without_its_layout_is_refused(
    pool: Pool, tmp_path: Path
) -> None:
    pool.run(save, Setting(tp=2, zero=0, clip=0.0), {}, str(tmp_path), ranks=4)
    forget_layout(tmp_path)
    texts = pool.run(refused_load, Setting(tp=4, zero=0, clip=0.0), {}, str(tmp_path), ranks=4)
    assert set(texts) == {texts[0]}
    assert (
        "saved at TP size 2, but the TP size of this model is 4; load it with autotp_size"
        in texts[0]
    )


def load(setting: Setting, section: dict[str, Any], folder: str) -> dict[str, torch.Tensor]:
    """The full weights after loading."""
    import deepspeed_autotp

    engine = engine_with(setting, section)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.zero_()
    engine.load_checkpoint(folder)
    return deepspeed_autotp.full_state_dict(engine)


def test_weights_that_fit_but_are_sharded_otherwise_are_resharded(
    pool: Pool, tmp_path: Path
) -> None:
    up = {"patterns": [r".*\.(gate|up)_proj\.weight"], "partition_type": "column"}
    down = {"patterns": [r".*\.down_proj\.weight"], "partition_type": "row"}
    halves = {"shape": [[56, 56], -1]}
    plain, fused = (
        {"partition_config": {"layer_specs": [up | shape, down], "use_default_specs": False}}
        for shape in ({}, halves)
    )
    setting = Setting(tp=2, zero=1, clip=0.0, self_check=False)
    pool.run(save, setting, plain, str(tmp_path))
    expected = build("llama", tied=False).state_dict()
    for weights in pool.run(load, setting, fused, str(tmp_path)):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    forget_layout(tmp_path)
    texts = pool.run(refused_load, setting, fused, str(tmp_path))
    assert set(texts) == {texts[0]}
    assert "sharded by other rules" in texts[0]


def test_metadata_of_a_later_version_is_refused_and_of_the_first_is_read(tmp_path: Path) -> None:
    file = tmp_path / "tensor_parallel.json"
    plan = Plan(llama(), preset(), ranks=2)
    write_metadata(tmp_path, plan)
    check_metadata(tmp_path, read_metadata(tmp_path), plan, rank=0)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 6}))
    with pytest.raises(ValueError, match="metadata of version 6, expected at most 5; load it with"):
        check_metadata(tmp_path, read_metadata(tmp_path), plan, rank=0)
    # As the first version wrote it for this plan.
    file.write_text('{"ranks": 2, "layout": "fc8303079c9e66345b043f1be13a16e5"}')
    check_metadata(tmp_path, read_metadata(tmp_path), plan, rank=0)
    other = Plan(llama(), preset(), ranks=2, replicated=["lm_head"])
    with pytest.raises(ValueError, match="sharded by other rules"):
        check_metadata(tmp_path, read_metadata(tmp_path), other, rank=0)
