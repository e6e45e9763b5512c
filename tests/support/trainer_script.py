# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Trainer script as a user writes it, as a function that a worker runs."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

ROWS = 32
LENGTH = 16


@dataclass(frozen=True, slots=True)
class Script:
    """What differs between the runs; ``more`` holds further TrainingArguments."""

    out: str
    tp: int
    zero: int = 1
    tied: bool = False
    family: str = "llama"
    steps: int = 4
    resume: bool = False
    pretrained: str | None = None
    sharded_init: bool = False
    more: dict[str, Any] = field(default_factory=dict)


class Examples(torch.utils.data.Dataset[Any]):
    """Random rows, most of them partly masked, so that replicas see unequal token counts."""

    def __init__(self, count: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, 96, (count, LENGTH), generator=draw)
        self.labels = self.ids.clone()
        for row in range(count):
            self.labels[row, : row % 11] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def deepspeed_config(script: Script) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        # ZeRO 3 partitions every weight, however small.
        "zero_optimization": {"stage": script.zero, "stage3_param_persistence_threshold": 0},
    }
    if script.tp > 1:
        config["tensor_parallel"] = {"autotp_size": script.tp}
    return config


def sharded(script: Script) -> AbstractContextManager[None]:
    """Where the script asks for it, what loads a pretrained model as shards."""
    import deepspeed_autotp

    if not script.sharded_init:
        return nullcontext()
    return deepspeed_autotp.sharded_init(tp_size=script.tp)


def make_trainer(script: Script) -> Any:
    """The model, the arguments and the Trainer, in the order of the documentation."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from tests.support.small_models import build

    def make_arguments() -> TrainingArguments:
        return TrainingArguments(
            output_dir=script.out,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=4,
            max_steps=script.steps,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            weight_decay=0.01,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            deepspeed=deepspeed_config(script),
            **{"learning_rate": 1e-2, **script.more},
        )

    if script.pretrained is None:
        model, arguments = build(script.family, tied=script.tied), make_arguments()
    else:
        arguments = make_arguments()
        with sharded(script):
            model = AutoModelForCausalLM.from_pretrained(script.pretrained)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Examples(ROWS, 1),
        eval_dataset=Examples(ROWS // 2, 2),
    )


def run_script(script: Script) -> list[dict[str, float]]:
    """Train, evaluate and save; what the Trainer logged."""
    import deepspeed

    import deepspeed_autotp

    # Accelerate does it where it makes the process group itself; here the pool has made it.
    deepspeed.init_distributed(dist_backend="gloo")
    deepspeed_autotp.install()
    trainer = make_trainer(script)
    trainer.train(resume_from_checkpoint=script.resume)
    trainer.save_model(f"{script.out}/final")
    deepspeed_autotp.uninstall()
    history: list[dict[str, float]] = trainer.state.log_history
    return history


def save_untrained(folder: str, family: str) -> None:
    """A small model as ``from_pretrained`` finds it."""
    from tests.support.small_models import build

    model: Any = build(family, tied=False)
    model.save_pretrained(folder)


def saved_loss(folder: str) -> float:
    """The evaluation loss of a saved model, loaded by transformers alone in one process."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    data = Examples(ROWS // 2, 2)
    losses = []
    # As the Trainer evaluates: every step has four rows on each of two devices.
    for start in range(0, len(data), 8):
        rows = slice(start, start + 8)
        with torch.no_grad():
            losses.append(float(model(input_ids=data.ids[rows], labels=data.labels[rows]).loss))
    return sum(losses) / len(losses)
