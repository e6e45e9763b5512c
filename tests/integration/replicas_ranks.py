# SPDX-License-Identifier: Apache-2.0
"""What a Trainer and an Accelerate loop count, gather and report, to be run on ranks."""

from collections.abc import Iterator
from typing import Any

import torch

from tests.support.engine_config import accelerate_config
from tests.support.raised_error import raised_error
from tests.support.small_models import build
from tests.support.trainer_script import Examples, Script, deepspeed_config

# Of one process's speed, not of what is computed.
_TIMES = ("runtime", "per_second")
_LOGGED = ("loss", "grad_norm", "learning_rate", "num_input_tokens_seen", "epoch")


class Stream(torch.utils.data.IterableDataset[Any]):
    """Rows of unknown number."""

    def __init__(self, count: int) -> None:
        self.data = Examples(count, 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([self.data[row] for row in range(len(self.data))])


def metrics(of: Any) -> dict[str, float]:
    """Of an evaluation: how many rows it is of, and numbers that each row changes."""
    return {
        "rows": len(of.predictions),
        "accuracy": float((of.predictions.argmax(-1) == of.label_ids).mean()),
        "inputs": int(of.inputs.sum()),
        "labels": int(of.label_ids.sum()),
        "losses": len(of.losses),
    }


def trainer_counts(tp: int, folder: str, more: dict[str, Any]) -> dict[str, Any]:
    """Train, evaluate with a last batch that is short, and predict; all that is reported."""
    import deepspeed
    from transformers import Trainer, TrainingArguments

    import deepspeed_autotp

    deepspeed.init_distributed(dist_backend="gloo")
    deepspeed_autotp.install()
    streams = more.pop("streams", False)
    arguments = TrainingArguments(
        output_dir=f"{folder}/tp{tp}",
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        include_num_input_tokens_seen="all",
        include_for_metrics=["inputs", "loss"],
        deepspeed=deepspeed_config(Script(folder, tp=tp)),
        **{"max_steps": 3, "learning_rate": 1e-2, **more},
    )
    model: Any = build("llama", tied=False)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Stream(34) if streams else Examples(34, 1),
        eval_dataset=Examples(19, 2),
        compute_metrics=metrics,
    )
    trainer.train()
    evaluated, predicted = trainer.evaluate(), trainer.predict(Examples(19, 4)).metrics
    history = [row for row in trainer.state.log_history if "loss" in row]
    found = {
        "steps": [{key: row[key] for key in _LOGGED if key in row} for row in history],
        "tokens": trainer.state.num_input_tokens_seen,
        "flops": trainer.state.total_flos,
        "batch": trainer.get_total_train_batch_size(arguments),
        "parameters": model.num_parameters(),
        "evaluated": {k: v for k, v in evaluated.items() if not k.endswith(_TIMES)},
        "predicted": {k: v for k, v in predicted.items() if not k.endswith(_TIMES)},
    }
    deepspeed_autotp.uninstall()
    return found


def accelerate_counts(tp: int, loading: dict[str, Any]) -> dict[str, Any]:
    """A loop with a scheduler, and all that Accelerate's own functions say in it."""
    from accelerate import Accelerator, DataLoaderConfiguration, DeepSpeedPlugin, PartialState
    from accelerate.utils import gather_object, set_seed

    import deepspeed_autotp

    deepspeed_autotp.install()
    PartialState(cpu=True)
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=accelerate_config(tp, zero=1)),
        dataloader_config=DataLoaderConfiguration(**loading),
    )
    set_seed(5, device_specific=True)
    drawn = float(accelerator.gather(torch.rand(())).sum())
    torch.manual_seed(0)
    model = build("llama", tied=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
    data = torch.utils.data.DataLoader(Examples(15, 1), batch_size=4, shuffle=True)
    model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)
    steps = []
    for batch in data:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rows = accelerator.gather_for_metrics(batch["input_ids"])
        steps.append(
            {
                "loss": float(accelerator.gather(loss.detach()).mean()),
                "mean": float(accelerator.reduce(loss.detach(), "mean")),
                "sum": float(accelerator.reduce(loss.detach(), "sum")),
                "rate": scheduler.get_last_lr()[0],
                "rows": len(rows),
                "tokens": int(rows.sum()),
            }
        )
    with accelerator.split_between_processes(list(range(7))) as part:
        parts = gather_object(part)
    if accelerator.is_main_process:
        accelerator.set_trigger()
    found = {
        "steps": steps,
        "drawn": drawn,
        "parts": parts,
        "processes": accelerator.num_processes,
        "triggered": accelerator.check_trigger(),
        "batches": len(data),
        "main": accelerator.is_main_process,
    }
    deepspeed_autotp.uninstall()
    return found


def left_out_plugin() -> tuple[str, str]:
    """What an Accelerator says that leaves out its DeepSpeed plugin, with and without a TP size."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    import deepspeed_autotp

    def make(tp: int) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = DeepSpeedPlugin(hf_ds_config=accelerate_config(tp, zero=1))
        return raised_error(lambda: Accelerator(deepspeed_plugin=plugin, cpu=True))

    deepspeed_autotp.install()
    found = make(2), make(1)
    deepspeed_autotp.uninstall()
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


def replaced_names() -> list[str]:
    """Attributes of Accelerate and transformers that are others after ``install`` and
    ``uninstall``."""
    import accelerate
    import transformers.trainer
    from accelerate import data_loader, state
    from accelerate.utils import operations
    from accelerate.utils import random as seeds

    import deepspeed_autotp

    owners: list[Any] = [
        *(accelerate.Accelerator, accelerate.accelerator, accelerate.scheduler, accelerate.utils),
        *(operations, seeds, state.PartialState, data_loader.DataLoaderDispatcher),
        *(transformers.Trainer, transformers.trainer, transformers.TrainingArguments),
        transformers.integrations.deepspeed.HfTrainerDeepSpeedConfig,
    ]
    before = [dict(vars(owner)) for owner in owners]
    deepspeed_autotp.install()
    deepspeed_autotp.install()
    deepspeed_autotp.uninstall()
    return [
        f"{owner.__name__}.{name}"
        for owner, kept in zip(owners, before, strict=True)
        for name, value in vars(owner).items()
        if kept.get(name) is not value
    ]
