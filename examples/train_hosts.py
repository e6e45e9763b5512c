# SPDX-License-Identifier: Apache-2.0
"""Train a small Llama on one host or several, whatever has started the ranks.

torchrun, deepspeed and Ray Train name a rank in RANK, LOCAL_RANK and WORLD_SIZE, and where to meet
in MASTER_ADDR and MASTER_PORT; srun has names of its own. ``examples/hosts`` has what starts it.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from corpus import VOCABULARY, batch
from transformers import LlamaConfig, LlamaForCausalLM

import deepspeed_autotp

SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
ROWS = 8  # of a step, all replicas together


def name_rank() -> None:
    """What the others set, from what srun sets."""
    if "RANK" not in os.environ:
        os.environ |= {name: os.environ[theirs] for name, theirs in SLURM.items()}


def train(*, tp: int, steps: int) -> list[float]:
    """The losses of all replicas together, the same on every rank."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=8, **sizes))
    replicas = int(os.environ["WORLD_SIZE"]) // tp
    replica = int(os.environ["RANK"]) // tp  # the ranks of a TP group are consecutive
    engine, *_ = deepspeed_autotp.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": ROWS // replicas,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 1},
            "tensor_parallel": {"autotp_size": tp},
        },
    )
    losses = []
    for step in range(steps):
        ids = batch(step, rows=ROWS, length=64).chunk(replicas)[replica].to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2, help="TP size")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--losses", type=Path, help="write the losses here, as JSON")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    options = parser.parse_args()
    name_rank()
    losses = train(tp=options.tp, steps=options.steps)
    if dist.get_rank() == 0:
        print(json.dumps(losses))
        if options.losses:
            options.losses.write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
