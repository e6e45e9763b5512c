# SPDX-License-Identifier: Apache-2.0
"""Short runs with one option, to be run on ranks."""

import copy
import shutil
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from tests.support.loss_curves import own_rows
from tests.support.options import Option
from tests.support.small_models import build, tokens

STEPS = 3
CLIP = 0.5


def configuration(option: Option, zero: int, *, tp: int) -> dict[str, Any]:
    """The configuration of a run: with ``option``, at a TP size that may be 1."""
    replicas = dist.get_world_size() // tp
    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4 // replicas,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    config = base | copy.deepcopy(dict(option.config))
    config["zero_optimization"] = {"stage": zero, **config.get("zero_optimization", {})}
    if tp > 1:
        config["tensor_parallel"] = {"autotp_size": tp, "self_check": False}
    return config


class Lion(torch.optim.Optimizer):
    """The sign of a mean of gradients: works element by element, under no known name."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.sub_(group["lr"] * (0.9 * mean + 0.1 * p.grad).sign())
                mean.lerp_(p.grad, 0.01)


class Trusting(torch.optim.Optimizer):
    """As LARS: a step as long as the tensor."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad * (p.norm() / (p.grad.norm() + 1e-12)))


class Preconditioned(torch.optim.Optimizer):
    """As Shampoo: gradients times the root of a sum of their products."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.ndim != 2:
                    p.sub_(group["lr"] * p.grad)
                    continue
                products = self.state[p].setdefault("products", torch.eye(p.shape[0]) * 1e-3)
                products.add_(p.grad @ p.grad.T)
                values, vectors = torch.linalg.eigh(products)
                root = vectors @ torch.diag(values.clamp(min=1e-6) ** -0.25) @ vectors.T
                p.sub_(group["lr"] * (root @ p.grad))


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def _transformers_adafactor(model: nn.Module) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    made: torch.optim.Optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False)
    return made


def _torch(name: str, **more: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: getattr(torch.optim, name)(model.parameters(), **more)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": _torch("SGD", lr=0.1),
    "SGD+momentum": _torch("SGD", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": _torch("AdamW", lr=1e-2),
    "AdamW fused": _torch("AdamW", lr=1e-2, fused=True),
    "AdamW foreach": _torch("AdamW", lr=1e-2, foreach=True),
    "Adam amsgrad": _torch("Adam", lr=1e-2, amsgrad=True),
    **{
        name: _torch(name, lr=1e-2)
        for name in ("Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "Rprop", "Adafactor")
    },
    "Adagrad later": lambda model: lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    "Adadelta": _torch("Adadelta", lr=1.0),
    "ASGD": _torch("ASGD", lr=0.1),
    "LBFGS": _torch("LBFGS"),
    "SparseAdam": _torch("SparseAdam"),
    "Muon": lambda model: torch.optim.Muon(matrices(model), lr=1e-2),
    "transformers.Adafactor": _transformers_adafactor,
    "Lion": lambda model: Lion(model.parameters()),
    "Trusting": lambda model: Trusting(model.parameters()),
    "Preconditioned": lambda model: Preconditioned(model.parameters()),
    "config": lambda model: None,
}


def run(option: Option, stage: int | None, tp: int) -> dict[str, Any]:
    """Losses, gradient norms, and the full weights at the beginning and the end, on rank 0; or the
    error that came first, and where."""
    model = build("llama", tied=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    where = "before"
    try:
        step, full = (
            _in_loop(model, option, tp=tp)
            if stage is None
            else _in_engine(model, option, stage, tp=tp)
        )
        where = "training"
        pairs = [step(number) for number in range(STEPS)]
        after = full()
    except Exception as error:
        return {"where": where, "error": f"{type(error).__name__}: {error}"}
    losses, norms = zip(*pairs, strict=True)
    found: dict[str, Any] = {"losses": list(losses), "norms": list(norms)}
    if dist.get_rank() == 0:
        found |= {"before": before, "after": after}
    return found


_Steps = tuple[Callable[[int], tuple[float, float]], Callable[[], dict[str, torch.Tensor]]]


def _mean(loss: torch.Tensor) -> float:
    total = loss.detach().float().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def _in_engine(model: Any, option: Option, stage: int, *, tp: int) -> _Steps:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    config = configuration(option, stage, tp=tp)
    accumulate = config["gradient_accumulation_steps"]
    config["train_micro_batch_size_per_gpu"] //= accumulate
    folder = _shared_folder()
    if option.special == "in a folder":
        config["csv_monitor"]["output_path"] = folder
    optimizer = OPTIMIZERS[option.optimizer](model)
    accelerator = deepspeed.accelerator.get_accelerator()
    with mock.patch.object(accelerator, "is_fp16_supported", lambda: True):
        engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)
    undo = _checkpoint_layers(model, config) if option.special == "checkpointed" and tp > 1 else {}

    def step(number: int) -> tuple[float, float]:
        total = torch.zeros(())
        for ids in own_rows(tokens(number), tp=tp).chunk(accumulate):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / accumulate
        if option.special == "save" and number == 1:
            engine.save_checkpoint(folder)
            engine.load_checkpoint(folder)
        return _mean(total), float(engine.get_global_grad_norm() or 0.0)

    def full() -> dict[str, torch.Tensor]:
        if tp > 1:
            weights = deepspeed_autotp.full_state_dict(engine)
        else:
            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        engine.destroy()
        vars(deepspeed.checkpointing).update(undo)
        shutil.rmtree(folder, ignore_errors=True)
        return weights

    return step, full


def _shared_folder() -> str:
    """One folder for all ranks."""
    found = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(found)
    return found[0]


def _checkpoint_layers(model: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Let the layers of ``model`` be recomputed by DeepSpeed's function; what it had set before."""
    import deepspeed

    before = {k: v for k, v in vars(deepspeed.checkpointing).items() if v is None or v in (0, 1)}
    options = config["activation_checkpointing"]
    deepspeed.checkpointing.configure(
        deepspeed.utils.groups,
        partition_activations=options["partition_activations"],
        checkpoint_in_cpu=options.get("cpu_checkpointing", False),
    )
    model.gradient_checkpointing_enable()
    for layer in model.model.layers:
        assert layer._gradient_checkpointing_func is not None
        layer._gradient_checkpointing_func = deepspeed.checkpointing.checkpoint
    return before


def _in_loop(model: Any, option: Option, *, tp: int) -> _Steps:
    if tp > 1:
        deepspeed_autotp.parallelize(model, tp_size=tp, config={"self_check": False})
    optimizer = OPTIMIZERS[option.optimizer](model)

    def step(number: int) -> tuple[float, float]:
        ids = tokens(number)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        clip = deepspeed_autotp.clip_grad_norm_ if tp > 1 else nn.utils.clip_grad_norm_
        parameters = list(model.parameters())
        if option.special == "clip values":
            nn.utils.clip_grad_value_(parameters, 1e-3)
        for each in parameters if option.special == "clip each" else ():
            clip([each], 1e-2)
        norm = clip(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return _mean(loss), float(norm)

    def full() -> dict[str, torch.Tensor]:
        if tp > 1:
            return deepspeed_autotp.full_state_dict(model)
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    return step, full


def run_all(options: list[Option], tp: int) -> dict[tuple[str, int | None], dict[str, Any]]:
    """Runs of several options, one after the other, by name and stage."""
    return {(each.name, stage): run(each, stage, tp) for each in options for stage in each.stages}
