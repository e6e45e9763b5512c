# SPDX-License-Identifier: Apache-2.0
"""install() changes two names of DeepSpeed, and uninstall() puts them back."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed_autotp
from tests.support.engine_config import Setting, engine_config
from tests.support.loss_curves import RATE, single_losses, train_engine, worst_difference
from tests.support.small_models import build
from tests.support.worker_pool import Pool

SETTING = Setting(tp=2, zero=1, clip=1.0)
WITHOUT = Setting(tp=1, zero=1, clip=1.0)


def changed_names(before: dict[str, Any]) -> set[str]:
    import deepspeed

    after = vars(deepspeed)
    assert after.keys() == before.keys()
    return {name for name, value in before.items() if after[name] is not value}


def install_twice() -> list[set[str]]:
    import deepspeed

    before = dict(vars(deepspeed))
    found = []
    deepspeed_autotp.install()
    installed = dict(vars(deepspeed))
    found.append(changed_names(before))
    deepspeed_autotp.install()
    found.append(changed_names(installed))
    deepspeed_autotp.uninstall()
    found.append(changed_names(before))
    deepspeed_autotp.uninstall()
    found.append(changed_names(before))
    return found


def test_install_replaces_two_functions_once_and_uninstall_restores_them(pool: Pool) -> None:
    (found,) = pool.run(install_twice, ranks=1)
    assert found == [{"initialize", "tp_model_init"}, set(), set(), set()]


def make_engine(initialize: Any, setting: Setting) -> Any:
    model = build("llama", tied=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine, *_ = initialize(model=model, optimizer=optimizer, config=engine_config(setting))
    return engine


def is_sharded(engine: Any) -> bool:
    try:
        deepspeed_autotp.tensor_parallel(engine)
    except ValueError:
        return False
    return True


def train_through_both_names(setting: Setting) -> list[tuple[bool, float]]:
    """Whether each engine is sharded and how far its losses are from one process."""
    import deepspeed

    expected = single_losses(build("llama", tied=False), clip=setting.clip)
    found = []

    def train(initialize: Any) -> None:
        engine = make_engine(initialize, setting)
        losses = train_engine(engine, tp=setting.tp)
        found.append((is_sharded(engine), worst_difference(losses, expected)))
        engine.destroy()

    deepspeed_autotp.install()
    train(deepspeed.initialize)
    train(deepspeed_autotp.initialize)
    deepspeed_autotp.uninstall()
    train(deepspeed_autotp.initialize)
    return found


@pytest.mark.parametrize("setting", [SETTING, WITHOUT], ids=["with TP", "without TP"])
def test_both_names_train_while_installed_and_ours_afterwards(pool: Pool, setting: Setting) -> None:
    for found in pool.run(train_through_both_names, setting):
        assert [sharded for sharded, _ in found] == [setting.tp > 1] * 3
        assert max(difference for _, difference in found) <= 1e-5


def uninstall_in_the_middle() -> float:
    import deepspeed

    expected = single_losses(build("llama", tied=False), clip=SETTING.clip, steps=4)
    deepspeed_autotp.install()
    engine = make_engine(deepspeed.initialize, SETTING)
    losses = train_engine(engine, tp=SETTING.tp, steps=2)
    deepspeed_autotp.uninstall()
    losses += train_engine(engine, tp=SETTING.tp, first=2, steps=2)
    return worst_difference(losses, expected)


def test_an_engine_outlives_uninstall(pool: Pool) -> None:
    assert max(pool.run(uninstall_in_the_middle)) <= 1e-5


ORDER = """
import deepspeed_autotp
{first}
deepspeed_autotp.install()
import accelerate, transformers.integrations.deepspeed, transformers.trainer
import sys, deepspeed
original = deepspeed.initialize.deepspeed_original, deepspeed.tp_model_init.deepspeed_original
held = [
    (module, name)
    for module, loaded in sys.modules.items()
    if module.partition(".")[0] in ("transformers", "accelerate")
    for name, value in list(vars(loaded).items())
    if any(value is one for one in original)
]
assert not held, held
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        pytest.param("", id="after"),
        pytest.param("import transformers.trainer", id="before", marks=pytest.mark.long),
    ],
)
def test_transformers_may_be_imported_before_or_after(first: str, tmp_path: Path) -> None:
    """Neither transformers nor Accelerate keeps DeepSpeed's functions under a name of its own."""
    script = tmp_path / "order.py"
    script.write_text(ORDER.format(first=first))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_deepspeed_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (deepspeed_autotp.install, deepspeed_autotp.initialize):
        with pytest.raises(ImportError, match="pip install 'deepspeed>=0.19,<0.20'.*parallelize"):
            call()
