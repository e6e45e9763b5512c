# SPDX-License-Identifier: Apache-2.0
"""Training through every documented way to ask for tensor parallelism, each against one process."""

import base64
import copy
import json
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import deepspeed_autotp
from tests.support.engine_config import config_without_section
from tests.support.loss_curves import (
    own_rows,
    sgd,
    single_losses,
    train_engine,
    worst_difference,
)
from tests.support.small_models import build, tokens

STEPS = 3

PHI3: dict[str, Any] = {
    "use_default_specs": False,
    "layer_specs": [
        {
            "patterns": [r".*\.qkv_proj$"],
            "partition_type": "column",
            "shape": [[64, 32, 32], -1],
        },
        {"patterns": [r".*\.gate_up_proj$"], "partition_type": "column", "shape": [2, -1]},
        {"patterns": [r".*\.o_proj$", r".*\.down_proj$"], "partition_type": "row"},
    ],
}
LLAMA: dict[str, Any] = {
    "strict_mode": True,
    "layer_specs": [
        {"patterns": [r".*\.(o|down)_proj"], "partition_type": "row"},
        {"patterns": [r".*\.(q|k|v|gate|up)_proj"], "partition_type": "column"},
    ],
}


def train_section(family: str, tp: int, section: dict[str, Any] | None, dtype: Any) -> float:
    """Worst loss difference of a run with a ``tensor_parallel`` section.

    Without one ``tp_model_init`` with ``dtype`` gives the TP size.
    """
    expected = single_losses(build(family, tied=False), clip=0.0, steps=STEPS)
    model = build(family, tied=False)
    config = config_without_section(tp=tp)
    if section is None:
        assert deepspeed_autotp.tp_model_init(model, tp_size=tp, dtype=dtype) is model
    else:
        config["tensor_parallel"] = section
    given = copy.deepcopy(config)
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=sgd(model), config=config)
    assert config == given, "the configuration of the user was changed"
    assert deepspeed_autotp.tensor_parallel(engine).group.size == tp
    return worst_difference(train_engine(engine, tp=tp, steps=STEPS), expected)


def train_form(form: str) -> float:
    """As above with the configuration as a dictionary, a path or base64, in every place."""
    expected = single_losses(build("llama", tied=False), clip=0.0, steps=STEPS)
    model = build("llama", tied=False)
    config = config_without_section(tp=2) | {"tensor_parallel": {"autotp_size": 2}}
    text = json.dumps(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(text)
        encoded = base64.urlsafe_b64encode(text.encode()).decode()
        arguments: dict[str, Any] = {
            "dict": {"config": config},
            "path": {"config": str(path)},
            "pathlib": {"config": path},
            "base64": {"config": encoded},
            "args": {"args": Namespace(deepspeed_config=str(path), local_rank=dist.get_rank())},
            "config_params": {"config_params": config},
        }[form]
        engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=sgd(model), **arguments)
    if form == "args":
        assert arguments["args"].deepspeed_config == str(path), "args was changed"
    assert deepspeed_autotp.tensor_parallel(engine).group.size == 2
    return worst_difference(train_engine(engine, tp=2, steps=STEPS), expected)


def kinds_of_shards(family: str, section: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """Kind, rule and source by parameter, from a sharded engine."""
    model = build(family, tied=False)
    tp = section["autotp_size"]
    config = config_without_section(tp=tp) | {"tensor_parallel": section}
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=sgd(model), config=config)
    plan = deepspeed_autotp.tensor_parallel(engine).plan
    return {entry.name: (entry.kind, entry.rule, entry.source) for entry in plan.entries}


def local_config() -> dict[str, Any]:
    """What an attention module sees that reads head counts from the model's configuration."""
    model = build("phi3", tied=False)
    deepspeed_autotp.parallelize(model, tp_size=2, config={"preset_model": "phi3"})
    attention = model.model.layers[0].self_attn
    model.config.attention_dropout = 0.25
    return {
        "heads of the model": model.config.num_attention_heads,
        "heads of this rank": attention.config.num_attention_heads,
        "key heads of this rank": attention.config.num_key_value_heads,
        "set later": attention.config.attention_dropout,
        "same class": isinstance(attention.config, type(model.config)),
        "copied": copy.deepcopy(attention.config).num_attention_heads,
        "saved": model.config.to_dict()["num_attention_heads"],
    }


def documented_example() -> list[float]:
    """Two steps with exactly the configuration of the documentation, and the grain it asks for."""
    config = {
        "tensor_parallel": {"autotp_size": 4, "tp_grain_size": 64, "preset_model": "llama"},
        "train_batch_size": 8,
        "bf16": {"enabled": True},
    }
    given = copy.deepcopy(config)
    model = build("llama", tied=False, intermediate_size=384)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)
    assert config == given
    rows = model.model.layers[0].mlp.up_proj.weight.shape[0]
    assert rows in (64, 128), "widths are multiples of the grain"
    losses = []
    for step in range(2):
        ids = own_rows(tokens(step, rows=2), tp=4)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses
