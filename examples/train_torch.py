# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism in a plain torchrun loop, without DeepSpeed.

torchrun --nproc-per-node=2 examples/train_torch.py

Ends with a folder that ``LlamaForCausalLM.from_pretrained("torch-output")`` loads.
"""

import torch
import torch.distributed as dist
from corpus import VOCABULARY, batch
from transformers import LlamaConfig, LlamaForCausalLM

import deepspeed_autotp


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    ).to(device)
    model = deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    for step in range(20):
        ids = batch(step, rows=4, length=128).to(device)  # the same rows on every TP rank
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        deepspeed_autotp.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step:2d}  loss {loss.item():.4f}")

    deepspeed_autotp.save_pretrained(model, "torch-output")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
