# SPDX-License-Identifier: Apache-2.0
"""Train a small Llama on text with tensor parallelism, data parallelism and ZeRO.

    torchrun --nproc-per-node=4 examples/train_deepspeed.py --tp 2      (or: deepspeed ...)
    python examples/train_deepspeed.py --tp 1                           (one process)

Two lines differ from a script that trains with DeepSpeed alone: the ``tensor_parallel``
section of the configuration, and ``deepspeed_autotp.initialize`` for ``deepspeed.initialize``.
"""

import argparse
import json
import os
import time
from pathlib import Path

import deepspeed
import torch
from corpus import VOCABULARY, batch
from rich.console import Console
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import deepspeed_autotp


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def configuration(options: argparse.Namespace, *, replicas: int) -> dict:
    return {
        "train_batch_size": options.rows * int(os.environ["WORLD_SIZE"]) // replicas,
        "train_micro_batch_size_per_gpu": options.rows // replicas,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": options.zero},
        "tensor_parallel": {"autotp_size": options.tp},
        "bf16": {"enabled": options.bf16},
        "steps_per_print": 10**9,
    }


def train(options: argparse.Namespace) -> list[float]:
    world = int(os.environ["WORLD_SIZE"])
    replicas = world // options.tp
    rank = int(os.environ["RANK"])
    replica = rank // options.tp  # the ranks of a TP group are consecutive

    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    engine, _, _, _ = deepspeed_autotp.initialize(
        model=model,
        optimizer=optimizer,
        config=configuration(options, replicas=replicas),
    )
    if rank == 0 and options.tp > 1:
        plan = deepspeed_autotp.tensor_parallel(engine).plan
        Console().print(deepspeed_autotp.plan_table(plan))

    losses = []
    rows = options.rows // replicas
    started = time.perf_counter()
    with tqdm(
        range(options.steps), desc=options.label, disable=rank != 0, mininterval=0.5
    ) as steps:
        for step in steps:
            everyone = batch(step, rows=options.rows, length=options.length)
            ids = everyone[replica * rows : (replica + 1) * rows].to(engine.device)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(mean_over_ranks(loss.detach()))
            tokens = (step + 1) * everyone.numel() / (time.perf_counter() - started)
            steps.set_postfix(
                loss=f"{losses[-1]:.3f}", tokens_per_s=f"{tokens:,.0f}", refresh=False
            )
    return losses


def mean_over_ranks(loss: torch.Tensor) -> float:
    """The loss of the global batch; the ranks of a TP group have one loss, so all may count."""
    deepspeed.comm.all_reduce(loss)
    return loss.item() / deepspeed.comm.get_world_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2, help="TP size")
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=8, help="sequences per step, all ranks")
    parser.add_argument("--length", type=int, default=128, help="bytes per sequence")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--label", default="train", help="name of the progress bar")
    parser.add_argument("--losses", type=Path, help="write the losses here, as JSON")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    options = parser.parse_args()

    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }.items():
        os.environ.setdefault(name, value)
    losses = train(options)
    if options.losses and os.environ["RANK"] == "0":
        options.losses.write_text(json.dumps(losses))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
