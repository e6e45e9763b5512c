# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_kept_gradients.py do."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.loss_curves import own_rows
from tests.support.raised_error import raised_error

WIDTH, ROWS, TP = 8, 4, 2
RULES: dict[str, Any] = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*\.up\.(weight|bias)$"], "partition_type": "column"},
        {"patterns": [r".*\.down\.weight$"], "partition_type": "row"},
    ],
}
SKIP: dict[str, Any] = {
    "use_default_specs": False,
    "layer_specs": [{"patterns": [r".*$"], "partition_type": "skip"}],
}
# Which blocks each micro-batch of each step uses, by the number of micro-batches.
USES: dict[int, list[list[str]]] = {
    1: [["012"], ["02"], ["02"], ["012"]],
    2: [["012", "012"], ["02", "012"], ["02", "02"], ["012", "02"]],
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


class Model(nn.Module):
    """Blocks, of which a forward uses those in ``uses``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.uses = "012"

    def forward(self, x: Tensor) -> Tensor:
        for number in self.uses:
            x = self.blocks[int(number)](x)
        return x.square().mean()


def batch(step: int, micro: int) -> Tensor:
    draw = torch.Generator().manual_seed(10 * step + micro)
    return torch.randn(ROWS, WIDTH, generator=draw)


def of_one_process(uses: list[list[str]]) -> tuple[list[float], dict[str, Tensor]]:
    """Gradient norms and weights of steps in which a parameter without a gradient has zeros."""
    model = Model()
    optimizer = optimizer_of(model)
    norms = []
    for step, micros in enumerate(uses):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for micro, model.uses in enumerate(micros):
            (model(batch(step, micro)) / len(micros)).backward()
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        optimizer.step()
    return norms, model.state_dict()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def engine_of(
    model: nn.Module, accumulate: int, zero: dict[str, Any], rules: dict[str, Any] = RULES
) -> Any:
    replicas = dist.get_world_size() // TP
    config = {
        "train_micro_batch_size_per_gpu": ROWS // replicas,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "tensor_parallel": {"autotp_size": TP, "partition_config": rules, "self_check": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    optimizer = optimizer_of(model)
    return deepspeed_autotp.initialize(model=model, config=config, optimizer=optimizer)[0]


def take_steps(engine: Any, uses: list[list[str]], forwards_first: bool) -> list[float]:
    """Gradient norms; ``forwards_first``: all those of a step are before its backward passes."""
    norms = []
    for step, micros in enumerate(uses):
        losses = (forward(engine, step, micro, use) for micro, use in enumerate(micros))
        for loss in list(losses) if forwards_first else losses:
            engine.backward(loss)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return norms


def forward(engine: Any, step: int, micro: int, uses: str) -> Tensor:
    engine.module.uses = uses
    loss: Tensor = engine(own_rows(batch(step, micro), tp=TP))
    return loss


def worst_of_steps(
    accumulate: int, zero: dict[str, Any], forwards_first: bool = False, skips: bool = False
) -> tuple[float, float]:
    """How far gradient norms and full weights are from those of one process."""
    uses = USES[accumulate]
    expected, weights = of_one_process(uses)
    engine = engine_of(Model(), accumulate, zero, SKIP if skips else RULES)
    norms = take_steps(engine, uses, forwards_first)
    worst_norm = max(abs(a - b) for a, b in zip(norms, expected, strict=True))
    full = engine._consolidated_16bit_state_dict()
    worst = 0.0
    if dist.get_rank() == 0:
        assert full.keys() == weights.keys()
        worst = max(float((full[name] - weights[name]).abs().max()) for name in weights)
    engine.destroy()
    return worst_norm, worst


def second_backward_before_a_step(zero: dict[str, Any], between: str) -> str:
    """The error of it, or "nothing"; ``between`` the backward passes: "forward" or "zero_grad"."""
    engine = engine_of(Model(), 1, zero)
    engine.backward(forward(engine, 0, 0, "012"))
    if between == "zero_grad":
        engine.optimizer.zero_grad()

    def again() -> None:
        engine.backward(forward(engine, 0, 1, "012"))
        engine.step()

    try:
        return raised_error(again)
    finally:
        engine.destroy()
