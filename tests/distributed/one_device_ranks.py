# SPDX-License-Identifier: Apache-2.0
"""Several ranks on one device, over gloo: ``torchrun -m tests.distributed.one_device_ranks cuda``.

Rank 0 prints how far each layer, and a language model in three data types, is from one
process, as JSON. Neither DeepSpeed nor transformers has to be there.
"""

import json
import sys
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed_autotp
from deepspeed_autotp.checkpoint.full_state import rank0_state_dict
from tests.support import layer_cases
from tests.support.gathered_gradients import gathered_gradients

VOCABULARY, HIDDEN, INNER = 257, 48, 96
PLAN = {
    "embedding": "embedding_rowwise",
    "up": "colwise",
    "down": "rowwise",
    "head": "colwise_gather_output",
}


class LanguageModel(nn.Module):
    """Takes labels and names its head, so that no rank forms full logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.down(F.silu(self.up(x)))
        return F.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten())


def language_model(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Of the loss, and of every gradient of a model that went to the device as shards."""
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(LanguageModel().to(dtype))
    unsharded = made[0].to(device)
    vars(made[1])["_tp_plan"] = dict(PLAN)
    sharded = deepspeed_autotp.parallelize(
        made[1], tp_size=dist.get_world_size(), config={"self_check": False}, device=device
    )
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(0, VOCABULARY, (4, 33), generator=draw).to(device)
    labels = ids.roll(-1, 1)
    labels[0, :5] = -100
    losses = [model(ids, labels) for model in (unsharded, sharded)]
    for loss in losses:
        loss.backward()
    found = {"loss": layer_cases.distance(losses[1].detach(), losses[0].detach())}
    assert all(parameter.device.type == device for parameter in sharded.parameters())
    gradients = gathered_gradients(sharded)
    for name, parameter in unsharded.named_parameters():
        assert parameter.grad is not None
        apart = (gradients[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        found[name] = float(apart)
    return found | {"gathered": gathered(sharded, unsharded)}


def gathered(sharded: nn.Module, unsharded: nn.Module) -> float:
    """0 where all ranks, and rank 0 alone, get the full weights; else 1."""
    full = deepspeed_autotp.full_state_dict(sharded)
    first = rank0_state_dict(sharded, frozen=True)
    states = [full] if first is None else [full, first]
    assert (first is None) == (dist.get_rank() > 0)
    same = [
        torch.equal(state[n], w.cpu()) for state in states for n, w in unsharded.named_parameters()
    ]
    return float(not all(same))


def scattered(device: str) -> dict[str, float]:
    """Of the outputs of a model whose weights only rank 0 had, on the CPU."""
    torch.manual_seed(3)
    unsharded = LanguageModel().to(device)
    torch.manual_seed(3)
    with torch.device("meta" if dist.get_rank() else "cpu"):
        model = LanguageModel()
    vars(model)["_tp_plan"] = dict(PLAN)
    config = {"self_check": False}
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=config, device=device)
    ids = torch.arange(2 * VOCABULARY, device=device).remainder(VOCABULARY).view(2, -1)
    losses = [each(ids, ids).detach() for each in (unsharded, model)]
    return {
        "loss": layer_cases.distance(losses[1], losses[0]),
        "gathered": gathered(model, unsharded),
    }


def layers(device: str) -> dict[str, dict[str, float]]:
    known = find_spec("transformers") is not None
    names = [name for name in layer_cases.CASES if known or "gpt-2" not in name]
    with torch.device(device):
        return {name: layer_cases.distances(name) for name in names}


def main() -> None:
    device = sys.argv[1]
    dist.init_process_group("gloo")
    torch.backends.cuda.matmul.allow_tf32 = False
    if device == "cuda":
        torch.cuda.set_device(0)
    found: dict[str, Any] = layers(device)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found[f"language model, {dtype}"] = language_model(dtype, device)
    found["scattered, torch.float32"] = scattered(device)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
