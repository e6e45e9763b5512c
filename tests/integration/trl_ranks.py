# SPDX-License-Identifier: Apache-2.0
"""A script for TRL's SFTTrainer as a user writes it, as a function that a worker runs."""

from pathlib import Path
from typing import Any

import torch

from tests.support.trainer_script import Script, deepspeed_config

_WORDS = 95


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{number}" for number in range(_WORDS))]
    made = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def _texts(rows: int) -> Any:
    from datasets import Dataset

    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 20, (rows,), generator=draw).tolist()
    drawn = [torch.randint(0, _WORDS, (length,), generator=draw).tolist() for length in lengths]
    return Dataset.from_dict({"text": [" ".join(f"w{word}" for word in row) for row in drawn]})


def run_sft(script: Script, lora: bool) -> list[dict[str, float]]:
    """Train a Llama on texts of unequal lengths, and save it; what the trainer logged."""
    import deepspeed
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    import deepspeed_autotp
    from tests.support.small_models import build

    deepspeed.init_distributed(dist_backend="gloo")
    deepspeed_autotp.install()
    trainer = SFTTrainer(
        model=build("llama", tied=script.tied, vocab_size=_WORDS + 2),
        args=SFTConfig(
            output_dir=script.out,
            per_device_train_batch_size=4,
            max_steps=script.steps,
            logging_steps=1,
            learning_rate=1e-2,
            bf16=False,
            gradient_checkpointing=False,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            deepspeed=deepspeed_config(script),
        ),
        train_dataset=_texts(32),
        processing_class=_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )
    trainer.train()
    trainer.save_model(f"{script.out}/final")
    deepspeed_autotp.uninstall()
    history: list[dict[str, float]] = trainer.state.log_history
    return history


def saved_apart(folders: tuple[str, str]) -> float:
    """The largest difference of what two runs have saved, of the largest number of a tensor."""
    from safetensors.torch import load_file

    worst = 0.0
    for place in ("checkpoint-2", "final"):
        (a, b) = (
            load_file(next(Path(folder, place).glob("*model.safetensors"))) for folder in folders
        )
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            apart = (tensor - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-3)
            worst = max(worst, float(apart))
    return worst
