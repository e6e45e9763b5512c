# SPDX-License-Identifier: Apache-2.0
"""A stock Hugging Face Trainer script, with tensor parallelism by one more import and call.

    torchrun --nproc-per-node=4 examples/train_trainer.py --tp 2
    torchrun --nproc-per-node=2 examples/train_trainer.py --tp 1       (the same without TP)

The TP size is ``tensor_parallel.autotp_size`` of the DeepSpeed configuration. Everything else
is what the Trainer's documentation shows: it trains, evaluates, saves full weights that
``from_pretrained`` loads, and resumes.
"""

import argparse

import torch
from corpus import VOCABULARY, corpus
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import deepspeed_autotp

deepspeed_autotp.install()


class Windows(torch.utils.data.Dataset):
    """Consecutive windows of the corpus."""

    def __init__(self, first: int, count: int, length: int = 64) -> None:
        data = corpus()[first * length : (first + count) * length]
        self.rows = data.reshape(count, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--tied", action="store_true", help="tie embedding and output head")
    parser.add_argument("--out", default="trainer-output")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=options.tied,
        )
    )
    arguments = TrainingArguments(
        output_dir=options.out,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=8,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": options.zero},
            "tensor_parallel": {"autotp_size": options.tp},
        },
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Windows(0, 64),
        eval_dataset=Windows(64, 16),
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(f"{options.out}/final")
    trainer.save_state()


if __name__ == "__main__":
    main()
