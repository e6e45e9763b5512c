# SPDX-License-Identifier: Apache-2.0
"""The commands that show a plan without ranks and weights: ``plan`` and ``explain``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepspeed_autotp import _core
from deepspeed_autotp._core import Entry, Plan
from deepspeed_autotp.config.dtypes import parse_dtype
from deepspeed_autotp.config.load_config import infer_config_dtype, load_ds_config
from deepspeed_autotp.config.training_config import TPTrainingConfig, get_tensor_parallel_config
from deepspeed_autotp.interop.named_model import FORMS, named_model
from deepspeed_autotp.planning.model_description import describe
from deepspeed_autotp.planning.plan_table import plan_table
from deepspeed_autotp.planning.plan_words import explanation
from deepspeed_autotp.planning.planner import make_plan, skips_all

COMMANDS = ("plan", "explain")


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers of ``autotp``."""
    command = commands.add_parser(
        "plan",
        help="show how a model would be sharded, without weights and ranks",
        epilog="example: autotp plan llama:num_hidden_layers=4 --tp 2",
    )
    _add_model(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command = commands.add_parser(
        "explain",
        help="say how one parameter would be sharded, and who decided",
        epilog="example: autotp explain llama model.layers.0.self_attn.q_proj.weight --tp 2",
    )
    _add_model(command)
    command.add_argument("parameter", help="name of a parameter of the model")


def run(asked: argparse.Namespace, console: Console) -> int:
    """Run a command; the exit status. ValueError and OSError say what is wrong."""
    plan = _plan(asked)
    if asked.command == "explain":
        console.print(_explained(plan, _entry(plan, asked.parameter)))
    elif asked.json:
        print(json.dumps(_content(plan, asked.model), indent=2))
    else:
        console.print(plan_table(plan))
        for message in _messages(plan):
            console.print(escape(message))
    return 0


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help=FORMS)
    command.add_argument("--tp", type=int, required=True, help="TP size, 2 or more")
    command.add_argument("--config", help="a DeepSpeed configuration, for rules and precision")
    command.add_argument("--dtype", help="data type of the weights, such as bf16")


def _plan(asked: argparse.Namespace) -> Plan:
    """What a run starts from; its self-check may leave a block replicated."""
    least = 2
    if asked.tp < least:
        raise ValueError(f"--tp: got {asked.tp}, expected {least} or more")
    config = {} if asked.config is None else load_ds_config(asked.config)
    given = dict(get_tensor_parallel_config(config))
    given["autotp_size"] = asked.tp
    dtype = infer_config_dtype(config)
    if asked.dtype is not None:
        dtype = parse_dtype(asked.dtype, "--dtype")
    model, settings = named_model(asked.model, dtype=dtype), TPTrainingConfig(**given)
    must_shard = not skips_all(model, settings)
    return make_plan(describe(model), settings, ranks=asked.tp, must_shard=must_shard)


def _messages(plan: Plan) -> Iterator[str]:
    yield from plan.messages
    if plan.skips_all:
        yield "the rules skip all of the model: every rank holds and computes all of it"
        return
    warning = plan.replicated_warning()
    if warning is not None:
        yield warning


def _entry(plan: Plan, name: str) -> Entry:
    for entry in plan.entries:
        if entry.name == name:
            return entry
    near = _core.nearest(name, [entry.name for entry in plan.entries])
    raise ValueError(
        f"parameter: got {name!r}, expected a parameter of the model"
        + (f", such as {', '.join(near)}" if near else "")
    )


def _explained(plan: Plan, entry: Entry) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, words in explanation(plan, entry):
        table.add_row(title, escape(words))
    return table


def _content(plan: Plan, model: str) -> dict[str, Any]:
    rows = plan.table()
    ranks = [sum(sizes) for sizes in zip(*(row.local_bytes for row in rows), strict=True)]
    return {
        "model": model,
        "tp_size": plan.ranks,
        "bytes": sum(row.full_bytes for row in rows),
        "bytes_per_rank": ranks,
        "parameters": [
            {
                "pattern": row.pattern,
                "count": row.count,
                "kind": str(row.entry.kind),
                "source": str(row.entry.source),
                "rule": row.entry.rule,
                "shape": row.entry.shape,
                "local_shapes": [row.entry.local_shape(rank) for rank in range(plan.ranks)],
                "bytes": row.full_bytes,
                "bytes_per_rank": row.local_bytes,
            }
            for row in rows
        ],
        "messages": list(_messages(plan)),
    }
