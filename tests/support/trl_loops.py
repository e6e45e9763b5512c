# SPDX-License-Identifier: Apache-2.0
"""Loops with the trainers of TRL, as a user writes them, as functions that workers run."""

from pathlib import Path
from typing import Any

import torch

from tests.support.trainer_script import Script, deepspeed_config

WORDS = 95


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{number}" for number in range(WORDS))]
    made = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def _texts(rows: int) -> Any:
    from datasets import Dataset

    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 20, (rows,), generator=draw).tolist()
    drawn = [torch.randint(0, WORDS, (length,), generator=draw).tolist() for length in lengths]
    return Dataset.from_dict({"text": [" ".join(f"w{word}" for word in row) for row in drawn]})


def _pairs(rows: int) -> Any:
    """Prompts with an answer that is preferred, and one that is not."""
    from datasets import Dataset

    texts = [row.split() for row in _texts(3 * rows)["text"]]
    prompts, chosen, rejected = (texts[part::3] for part in range(3))
    return Dataset.from_dict(
        {
            "prompt": [" ".join(words) + " " for words in prompts],
            "chosen": [" ".join(words[: 3 + row % 4]) for row, words in enumerate(chosen)],
            "rejected": [" ".join(words[: 2 + row % 5]) for row, words in enumerate(rejected)],
        }
    )


def _unpaired(rows: int) -> Any:
    """Prompts with an answer that is wanted, or is not."""
    from datasets import Dataset

    pairs = list(_pairs(rows))
    return Dataset.from_dict(
        {
            "prompt": [row["prompt"] for row in pairs],
            "completion": [row["chosen" if at % 2 else "rejected"] for at, row in enumerate(pairs)],
            "label": [bool(at % 2) for at in range(rows)],
        }
    )


def _prompts(rows: int) -> Any:
    return _pairs(rows).remove_columns(["chosen", "rejected"])


def low_words(completions: list[str], **_: Any) -> list[float]:
    """A reward that is easy to learn: the share of the first words among those of an answer."""
    answers = [[int(word[1:]) for word in text.split()] for text in completions]
    return [sum(word < 20 for word in words) / max(1, len(words)) for words in answers]


_DATA = {"sft": _texts, "kto": _unpaired, "grpo": _prompts, "rloo": _prompts}


def training_data(kind: str, rows: int) -> Any:
    return _DATA.get(kind, _pairs)(rows)


def save_start(kind: str, script: Script, folder: str) -> None:
    """The model and the data that a run of :func:`run_loop` loads, as trainers want them: they load
    their reference model from there, too, and share what they compute of the data as files."""
    from transformers import LlamaForSequenceClassification

    from tests.support.small_models import build

    model: Any = build("llama", tied=script.tied, vocab_size=WORDS + 2)
    if kind == "reward":
        config = model.config
        config.num_labels, config.pad_token_id = 1, 0
        model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    data = training_data(kind, 40)
    data.select(range(32)).save_to_disk(f"{folder}/train")
    data.select(range(32, 40)).save_to_disk(f"{folder}/eval")


def _model(kind: str, script: Script) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    cls: Any = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    return cls.from_pretrained(script.pretrained)


def _trainer(kind: str) -> tuple[Any, Any]:
    import trl

    name = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward"}.get(kind, kind.upper())
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")


_GENERATES = {"max_completion_length": 6, "num_generations": 4, "temperature": 1.0}


def run_loop(kind: str, script: Script, lora: bool) -> tuple[list[dict[str, float]], list[str]]:
    """Train a Llama with a trainer of TRL, evaluate and save it; what the trainer logged, and the
    answers that this rank has generated."""
    import deepspeed
    from datasets import load_from_disk
    from peft import LoraConfig

    import deepspeed_autotp

    deepspeed.init_distributed(dist_backend="gloo")
    deepspeed_autotp.install()
    make, configure = _trainer(kind)
    answers: list[str] = []

    def reward(completions: list[str], **more: Any) -> list[float]:
        answers.extend(completions)
        return low_words(completions, **more)

    generates = kind in ("grpo", "rloo")
    more = {**(_GENERATES if generates else {}), **script.more}
    arguments = configure(
        output_dir=script.out,
        **{"per_device_train_batch_size": 4, **more},
        per_device_eval_batch_size=4,
        max_steps=script.steps,
        logging_steps=1,
        learning_rate=3e-3,
        bf16=False,
        gradient_checkpointing=False,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        deepspeed=deepspeed_config(script),
    )
    trainer = make(
        model=_model(kind, script),
        args=arguments,
        train_dataset=load_from_disk(f"{script.pretrained}/train"),
        eval_dataset=load_from_disk(f"{script.pretrained}/eval"),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
        **({"reward_funcs": reward} if generates else {}),
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model(f"{script.out}/final")
    deepspeed_autotp.uninstall()
    return trainer.state.log_history, answers


def saved_apart(folders: tuple[str, str]) -> float:
    """The largest difference of a tensor that two runs have saved, by the norm: Adam turns rounding
    into a full step where a gradient is nearly zero."""
    from safetensors.torch import load_file

    worst = 0.0
    for place in ("checkpoint-2", "final"):
        (a, b) = (
            load_file(next(Path(folder, place).glob("*model.safetensors"))) for folder in folders
        )
        # Accelerate writes a tied weight twice where nothing is sharded.
        assert b.keys() - a.keys() <= {"lm_head.weight"} and a.keys() <= b.keys()
        for name, tensor in a.items():
            apart = (tensor - b[name]).norm() / b[name].norm().clamp(min=1e-3)
            worst = max(worst, float(apart))
    return worst
