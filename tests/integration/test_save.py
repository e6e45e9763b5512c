# SPDX-License-Identifier: Apache-2.0
"""Weights are saved in full, whatever ZeRO does, and saving them does not change training."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.engine_config import Setting, engine_config
from tests.support.loss_curves import RATE, train_engine
from tests.support.small_models import build, tokens
from tests.support.worker_pool import Pool

STEPS = 2
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FROZEN = "model.layers.1.self_attn.q_proj.weight"
KINDS = pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("qwen2", True)], ids=["untied", "tied with biases"]
)


def make_engine(model: nn.Module, setting: Setting, **more: Any) -> Any:
    import deepspeed_autotp

    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    config = engine_config(setting) | more
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def make_model(family: str, *, tied: bool, seed: int = 0) -> nn.Module:
    """With a frozen weight, and a buffer that belongs to the state."""
    model = build(family, tied=tied, seed=seed)
    model.get_parameter(FROZEN).requires_grad_(False)
    model.register_buffer("scale", torch.full((3,), 2.0 + seed))
    return model


def copied(state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if state is None else {name: tensor.clone() for name, tensor in state.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor] | None) -> bool:
    return (
        b is not None
        and a.keys() == b.keys()
        and all(torch.equal(t, b[name]) for name, t in a.items())
    )


def save_and_train_on(family: str, tied: bool, setting: Setting, folder: str) -> dict[str, Any]:
    """Two steps, every way to gather the weights, two steps; and the same without it."""
    import deepspeed_autotp

    engine = make_engine(make_model(family, tied=tied), setting)
    undisturbed = train_engine(engine, tp=setting.tp, steps=2 * STEPS)
    last = deepspeed_autotp.full_state_dict(engine)
    engine.destroy()

    engine = make_engine(make_model(family, tied=tied), setting)
    losses = train_engine(engine, tp=setting.tp, steps=STEPS)
    consolidated = copied(engine._consolidated_16bit_state_dict())
    assert engine.save_16bit_model(folder, "all.bin")
    assert engine.save_16bit_model(folder, "trained.bin", exclude_frozen_parameters=True)
    deepspeed_autotp.save_pretrained(engine, Path(folder, "pretrained"))
    if setting.zero < 3:
        gather_in_place(engine)
    full = deepspeed_autotp.full_state_dict(engine)
    copies = copied(full)
    losses += train_engine(engine, tp=setting.tp, first=STEPS, steps=STEPS)

    found: dict[str, Any] = {
        "losses": losses == undisturbed,
        "weights": equal(deepspeed_autotp.full_state_dict(engine), last),
        "full stays as it was taken": equal(full, copies),
        "training went on": not equal(full, last),
        "only rank 0 has it": (consolidated is None) == (dist.get_rank() != 0),
    }
    if consolidated is not None:
        written = torch.load(Path(folder, "all.bin"), weights_only=True)
        trained = torch.load(Path(folder, "trained.bin"), weights_only=True)
        found["file"] = equal(written, full)
        found["consolidated"] = equal(consolidated, full)
        found["file without frozen"] = equal(
            trained, {name: t for name, t in full.items() if name != FROZEN}
        )
        pretrained = load_file(Path(folder, "pretrained", "model.safetensors"))
        untied = {n: t for n, t in full.items() if not (tied and n == "lm_head.weight")}
        found["pretrained"] = equal(pretrained, untied)
        found["loads"] = loads(family, tied, written, engine)
    engine.destroy()
    return found


def gather_in_place(engine: Any) -> None:
    """Gather every layer for a moment, as code written for DeepSpeed's AutoTP does."""
    from deepspeed.module_inject.layers import GatherReplacedLayerParams

    import deepspeed_autotp

    for entry in deepspeed_autotp.tensor_parallel(engine).plan.entries:
        module = engine.module.get_submodule(entry.name.rpartition(".")[0])
        parameters = list(module.parameters(recurse=False))
        with GatherReplacedLayerParams(parameters, module):
            assert engine.module.get_parameter(entry.name).shape == torch.Size(entry.shape)


def loads(family: str, tied: bool, written: dict[str, Tensor], engine: Any) -> bool:
    """Whether a plain model loads what was written, with nothing missing."""
    plain = make_model(family, tied=tied, seed=1).to(next(iter(written.values())).dtype)
    plain.load_state_dict(written)
    ids = tokens(99)
    return bool(plain(input_ids=ids, labels=ids).loss.isfinite())


@pytest.mark.sample(3)
@KINDS
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_saving_full_weights_does_not_disturb_training(
    pool: Pool, family: str, tied: bool, zero: int, tmp_path: Path
) -> None:
    setting = Setting(tp=2, zero=zero, clip=1.0)
    for found in pool.run(save_and_train_on, family, tied, setting, str(tmp_path), ranks=4):
        assert all(found.values()), found


@pytest.mark.sample(2)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_saving_sixteen_bit_weights_does_not_disturb_training(
    pool: Pool, zero: int, tmp_path: Path
) -> None:
    setting = Setting(tp=2, zero=zero, clip=1.0, precision="bf16")
    for found in pool.run(save_and_train_on, "qwen2", True, setting, str(tmp_path), ranks=4):
        assert all(found.values()), found


def test_gathering_in_place_keeps_the_memory_that_the_optimizer_updates(pool: Pool) -> None:
    """BF16_Optimizer writes new weights into one flat buffer and never looks at the parameters."""
    for losses, undisturbed in pool.run(gather_between_steps, ranks=4):
        assert losses == undisturbed
        assert len(set(losses)) == len(losses)


def gather_between_steps() -> list[list[float]]:
    setting = Setting(tp=2, zero=1, clip=1.0, precision="bf16")
    runs = []
    for disturb in (True, False):
        model = build("llama", tied=False)
        engine = make_engine(model, setting, data_types={"grad_accum_dtype": "fp32"})
        assert type(engine.optimizer).__name__ == "BF16_Optimizer"
        losses = train_engine(engine, tp=setting.tp, steps=STEPS)
        if disturb:
            gather_in_place(engine)
        runs.append(losses + train_engine(engine, tp=setting.tp, first=STEPS, steps=STEPS))
        engine.destroy()
    return runs


@pytest.mark.slow
@pytest.mark.long
def test_the_torch_example_saves_what_transformers_loads(pool: Pool, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "train_torch.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (loss,) = pool.run(loss_of_example, str(tmp_path / "torch-output"), ranks=1)
    assert loss < 4.0  # an untrained byte model has log(256) = 5.5


def loss_of_example(folder: str) -> float:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    topics = importlib.import_module("pydoc_data.topics").topics
    ids = torch.tensor([list("\n\n".join(topics[name] for name in sorted(topics)).encode()[:512])])
    return float(model(input_ids=ids, labels=ids).loss.detach())
