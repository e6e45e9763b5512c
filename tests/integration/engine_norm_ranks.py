# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_engine_norm.py do."""

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.fused_sgd import fused_sgd
from tests.support.loss_curves import RATE, own_rows
from tests.support.raised_error import raised_error
from tests.support.small_models import build, tokens

CLIP = 0.5
STEPS = 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Case:
    """One engine, and the model that it trains."""

    zero: int
    precision: str = "fp32"
    accumulation: str | None = None
    accumulate: int = 1
    family: str = "llama"
    tied: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    trained: str = ""  # regular expression of the parameters that are trained
    optimizer: str = "SGD"
    offload: bool = False

    @property
    def name(self) -> str:
        """The fields that differ from the default."""
        default = Case(zero=self.zero)
        values = {n: getattr(self, n) for n in self.__slots__}
        return ", ".join(
            f"{n}={v}" for n, v in values.items() if v != getattr(default, n) or n == "zero"
        )


def model_of(case: Case) -> nn.Module:
    """With weights that the 16-bit type of the case represents."""
    model = (
        build(case.family, tied=case.tied, **case.changes)
        .to(DTYPES.get(case.precision, torch.float32))
        .float()
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(case.trained, name) is not None)
    return model


def optimizer_of(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return fused_sgd(trained) if case.optimizer == "FusedSGD" else torch.optim.SGD(trained, lr=RATE)


def config_of(case: Case, *, tp: int) -> dict[str, Any]:
    replicas = dist.get_world_size() // tp
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4 // replicas // case.accumulate,
        "gradient_accumulation_steps": case.accumulate,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": case.zero},
        "tensor_parallel": {"autotp_size": tp, "self_check": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if case.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if case.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if case.precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    if case.precision == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "float16"}
    if case.accumulation:
        config["data_types"] = {"grad_accum_dtype": case.accumulation}
    return config


def of_one_process(case: Case) -> tuple[list[float], dict[str, Tensor]]:
    """Norms before clipping, and the weights after the last step, in float32."""
    model = model_of(case)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(case, model)
    norms = []
    for step in range(STEPS):
        ids = tokens(step)
        model(input_ids=ids, labels=ids).loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return norms, model.state_dict()


def gathered_norm(engine: Any, model: nn.Module) -> float:
    """The norm of the full gradients that the ranks hold, gathered parameter after parameter."""
    from deepspeed.utils import safe_get_full_grad

    state = deepspeed_autotp.tensor_parallel(model)
    square = torch.zeros((), dtype=torch.float64)
    for parameter in model.parameters():
        gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
        if gradient is None:
            continue
        entry = state.entry(parameter)
        assert entry is not None
        gradient = gradient.detach().float()
        if entry.is_sharded:
            shape = entry.local_shape(state.group.rank)
            gradient = state.gather(gradient.reshape(shape), entry=entry)
        square += gradient.double().square().sum()
    return float(square.sqrt()) / loss_scale(engine)


def loss_scale(engine: Any) -> float:
    scaler = engine.torch_autocast_z0_gradscaler
    if scaler is not None:
        return float(scaler.get_scale())
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0


def of_engine(case: Case, *, tp: int) -> dict[str, Any]:
    """Norms that the engine says, those of the gathered gradients, and the weights."""
    model = model_of(case)
    engine, *_ = deepspeed_autotp.initialize(
        model=model, optimizer=optimizer_of(case, model), config=config_of(case, tp=tp)
    )
    found: dict[str, Any] = {
        "norms": [],
        "gathered": [],
        "wrapper": type(engine.optimizer).__name__,
    }
    for step in range(STEPS):
        parts = own_rows(tokens(step), tp=tp).chunk(case.accumulate)
        for part, ids in enumerate(parts):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            if part == len(parts) - 1:
                found["gathered"].append(gathered_norm(engine, model))
            engine.step()
        norm = engine.get_global_grad_norm()
        found["norms"].append(None if norm is None else float(norm))
    found["weights"] = deepspeed_autotp.full_state_dict(engine)
    deepspeed_autotp.check_replicas(engine)
    engine.destroy()
    return found


@contextmanager
def dtypes_of_one_engine() -> Iterator[None]:
    """DeepSpeed keeps ``torch_autocast`` for the engines that a process makes later, and refuses
    float16 on a CPU that has no instructions for it, on which torch computes it all the same."""
    autocast = importlib.import_module("deepspeed.runtime.torch_autocast")
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    try:
        with mock.patch.object(accelerator, "is_fp16_supported", lambda: True):
            yield
    finally:
        autocast.TORCH_AUTOCAST_INITIALIZED = False


@dtypes_of_one_engine()
def compare(case: Case, tp: int) -> dict[str, Any]:
    """The engine against one process, and against the gradients that the ranks hold."""
    norms, weights = of_one_process(case)
    found = of_engine(case, tp=tp)
    own = found.pop("weights")
    worst = max(float((own[n].float() - t).abs().max()) for n, t in weights.items())
    return {**found, "expected": norms, "weights": worst}


@dtypes_of_one_engine()
def overflow(case: Case) -> dict[str, Any]:
    """Skipped steps, loss scales and weights around a gradient of rank 1 that is infinite."""
    model = model_of(case)
    engine, *_ = deepspeed_autotp.initialize(
        model=model, optimizer=optimizer_of(case, model), config=config_of(case, tp=2)
    )
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    found: dict[str, Any] = {"skipped": [], "scales": [], "moved": []}
    for step in range(STEPS):
        is_hit = step == 1 and dist.get_rank() == 1
        hook = weight.register_hook(lambda g: torch.full_like(g, torch.inf)) if is_hit else None
        before = deepspeed_autotp.full_state_dict(engine)
        engine.backward(engine(input_ids=tokens(step), labels=tokens(step)).loss)
        engine.step()
        after = deepspeed_autotp.full_state_dict(engine)
        found["skipped"].append(engine.skipped_steps)
        found["scales"].append(loss_scale(engine))
        found["moved"].append(any(not torch.equal(after[n], t) for n, t in before.items()))
        if hook is not None:
            hook.remove()
    deepspeed_autotp.check_replicas(engine)
    engine.destroy()
    return found


@dtypes_of_one_engine()
def refused(case: Case, more: dict[str, Any]) -> str:
    """What ``initialize`` raises for a case with more keys in its configuration."""
    model = model_of(case)
    config = {**config_of(case, tp=2), **more}
    return raised_error(
        lambda: deepspeed_autotp.initialize(
            model=model, optimizer=optimizer_of(case, model), config=config
        )
    )


def refused_optimizer(kind: str) -> tuple[str, bool]:
    """What ``initialize`` raises for an optimizer, and whether the model is sharded then."""
    model = build("llama", tied=False)
    config = config_of(Case(zero=1), tp=2)
    optimizer: Any = None
    if kind == "instance":
        optimizer = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2])
    elif kind == "function":
        optimizer = torch.optim.Adafactor
    else:
        config["optimizer"] = {"type": kind, "params": {"lr": 1e-3}}
    text = raised_error(
        lambda: deepspeed_autotp.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=list(model.parameters()),
            config=config,
        )
    )
    return text, model.lm_head.weight.shape != (96, 64)
