# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_skipped_model.py do."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.loss_curves import own_rows
from tests.support.raised_error import raised_error

WIDTH, RATE, CLIP, STEPS, TP = 16, 0.05, 0.2, 3, 2
SKIP: dict[str, Any] = {
    "use_default_specs": False,
    "layer_specs": [{"patterns": [r".*\.weight$"], "partition_type": "skip"}],
}


class Network(nn.Module):
    """Replicated layers around two that may be sharded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.ModuleDict({"up": nn.Linear(WIDTH, 40), "down": nn.Linear(40, WIDTH)})
        self.last = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.full((WIDTH,), 1.5))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        x = x + self.inner["down"](F.gelu(self.inner["up"](x))) * self.scale
        return (self.last(x) - target).square().mean()


def batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(50 + step)
    return torch.randn(4, WIDTH, generator=draw), torch.randn(4, WIDTH, generator=draw)


def of_one_process() -> tuple[list[float], list[float], dict[str, Tensor]]:
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses, norms = [], []
    for step in range(STEPS):
        loss = model(*batch(step))
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms, model.state_dict()


def with_own_layers() -> Network:
    """As users of DeepSpeed place its layers; each rank has its shards of them."""
    import deepspeed
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer
    from deepspeed.utils import groups

    deepspeed.init_distributed(dist_backend="gloo")
    groups._init_tp_mesh_device(tensor_model_parallel_size=TP)
    deepspeed_autotp.set_autotp_mode(training=True)
    model, handle = Network(), groups.get_tensor_model_parallel_group()
    model.inner["up"] = LinearLayer(model.inner["up"], handle)
    model.inner["down"] = LinearAllreduce(model.inner["down"], handle)
    return model


def engine_of(model: nn.Module, zero: int, rules: dict[str, Any] = SKIP) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": len(own_rows(batch(0)[0], tp=TP)),
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": zero},
        "tensor_parallel": {"autotp_size": TP, "partition_config": rules},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    return deepspeed_autotp.initialize(model=model, config=config, optimizer=optimizer)[0]


def worst_of_training(
    own_layers: bool, zero: int, folder: str
) -> tuple[float, float, float, list[int]]:
    """Of losses, gradient norms and full weights; and what DeepSpeed's groups answer."""
    from deepspeed.utils import groups

    losses, norms, weights = of_one_process()
    engine = engine_of(with_own_layers() if own_layers else Network(), zero)
    worst_loss = worst_norm = 0.0
    for step in range(STEPS):
        x, target = (own_rows(each, tp=TP) for each in batch(step))
        loss = engine(x, target)
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        mean = float(total) / torch.distributed.get_world_size()
        worst_loss = max(worst_loss, abs(mean - losses[step]))
        worst_norm = max(worst_norm, abs(float(engine.get_global_grad_norm()) - norms[step]))
    found = [engine._consolidated_16bit_state_dict()]
    engine.save_16bit_model(folder)
    worst = 0.0
    if torch.distributed.get_rank() == 0:
        found.append(torch.load(f"{folder}/pytorch_model.bin"))
        for full in found:
            assert full.keys() == weights.keys()
            each = (float((full[name] - weights[name]).abs().max()) for name in weights)
            worst = max(worst, *each)
    answers = [
        engine.autotp_size(),
        groups.get_tensor_model_parallel_world_size(),
        groups.get_tensor_model_parallel_rank(),
        groups.get_tensor_model_parallel_src_rank(),
        groups.get_data_parallel_world_size(),
    ]
    engine.destroy()
    return worst_loss, worst_norm, worst, answers


def refused(kind: str) -> str:
    """The error of a model of which something would go wrong without a word."""
    if kind == "different weights":
        model: nn.Module = Network()
        model.last.weight.data[0, 0] += torch.distributed.get_rank()
        return raised_error(lambda: engine_of(model, 0))
    model = with_own_layers()
    if kind == "sharded again":
        rule = {"patterns": [r"first\.weight$"], "partition_type": "column", "gather_output": True}
        rules = {"use_default_specs": False, "layer_specs": [rule]}
        return raised_error(lambda: engine_of(model, 0, rules))
    if kind == "parallelize":
        return raised_error(lambda: deepspeed_autotp.parallelize(model, tp_size=TP))
    if kind == "clipped":
        return raised_error(lambda: deepspeed_autotp.clip_grad_norm_(model, 1.0))
    return raised_error(lambda: deepspeed_autotp.full_state_dict(model))


class Planned(Network):
    """With a plan of its own, whose patterns have a `*` for several parts of a name."""

    _tp_plan = {"*.up": "colwise", "*.down": "rowwise"}


@torch.no_grad()
def worst_of_planned() -> tuple[float, list[int]]:
    model = Planned()
    expected = model(*batch(0))
    sharded = deepspeed_autotp.parallelize(model, tp_size=TP)
    shape = list(sharded.inner["up"].weight.shape)
    return float((sharded(*batch(0)) - expected).abs()), shape


def outside_of_group() -> str:
    """The error of initialize where tp_model_init was given a group of other ranks."""
    group = torch.distributed.new_group([0])
    model = Network()
    deepspeed_autotp.tp_model_init(model, 1, "fp32", tp_group=group)
    config = {"train_micro_batch_size_per_gpu": 1}
    try:
        return raised_error(lambda: deepspeed_autotp.initialize(model=model, config=config))
    finally:
        deepspeed_autotp.reset()
