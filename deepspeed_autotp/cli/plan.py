# SPDX-License-Identifier: Apache-2.0
"""The commands that show a plan without ranks and weights: ``plan`` and ``explain``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepspeed_autotp import _core
from deepspeed_autotp.cli.arguments import DONE
from deepspeed_autotp.cli.page.file import writable_file
from deepspeed_autotp.cli.plan_arguments import (
    accumulates,
    add_estimate_options,
    bandwidth_of,
    bytes_of,
    check_positive,
    left_out,
    lora_of,
    optimizer_of,
    zero_options,
)
from deepspeed_autotp.interop.model_forms import FORMS

if TYPE_CHECKING:
    from deepspeed_autotp._core import Entry, Plan
    from deepspeed_autotp.estimate.estimator import Request
    from deepspeed_autotp.estimate.subject import Subject

COMMANDS = ("plan", "explain")
# TP stays within a machine, where GPUs have fast links.
_MOST_RANKS = 8
_DEFAULT_BANDWIDTH = "450GB/s"


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers of ``autotp``."""
    command = commands.add_parser(
        "plan",
        help="show how a model would be sharded, and what it would need, without weights and ranks",
        epilog="example: autotp plan llama:num_hidden_layers=4 --tp 2 --dp 4 --zero 2 --seq 4096",
    )
    _add_model(command, tp_required=False)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--html", metavar="FILE", help="write a page to look at, without network")
    add_estimate_options(command)
    command = commands.add_parser(
        "explain",
        help="say how one parameter would be sharded, and who decided",
        epilog="example: autotp explain llama model.layers.0.self_attn.q_proj.weight --tp 2",
    )
    _add_model(command, tp_required=True)
    command.add_argument("parameter", help="name of a parameter of the model")


def run(asked: argparse.Namespace, console: Console) -> int:
    """Run a command; the exit status. ValueError and OSError say what is wrong."""
    if asked.command == "explain":
        plan = _planned(_subject(asked, _config(asked)), asked.tp)
        console.print(_explained(plan, _entry(plan, asked.parameter)))
        return DONE
    check_positive(asked)
    config = _config(asked)
    if asked.suggest:
        _suggest(asked, config, console)
    else:
        _plan(asked, config, console)
    return DONE


def _add_model(command: argparse.ArgumentParser, *, tp_required: bool) -> None:
    command.add_argument("model", metavar="MODEL", help=FORMS)
    command.add_argument("--tp", type=int, required=tp_required, help="TP size, 2 or more")
    command.add_argument("--config", help="a DeepSpeed configuration, for rules and precision")
    command.add_argument("--dtype", help="data type of the weights, such as bf16")


def _config(asked: argparse.Namespace) -> dict[str, Any]:
    from deepspeed_autotp.config.load_config import (
        load_ds_config,
        refuse_expert_parallel,
        refuse_misspelt_section,
    )

    if asked.config is None:
        return {}
    config = dict(load_ds_config(asked.config))
    refuse_misspelt_section(config)
    refuse_expert_parallel(config, called=f"autotp {asked.command}")
    return config


def _plan(asked: argparse.Namespace, config: dict[str, Any], console: Console) -> None:
    """What a run starts from; its self-check may leave a block replicated."""
    if asked.tp is None:
        raise ValueError("--tp: expected a TP size, such as 2, or --suggest")
    for option in ("gpus", "gpu_memory"):
        if vars(asked)[option] is not None:
            raise ValueError(f"--{option.replace('_', '-')}: expected --suggest beside it")
    file = None if asked.html is None else writable_file(asked.html)
    request = _request(asked, config)
    subject = _subject(asked, config)
    _planned(subject, asked.tp)

    from deepspeed_autotp.cli.plan_report import print_estimate
    from deepspeed_autotp.estimate.estimator import Estimator

    estimator = Estimator(subject)
    estimate = estimator.estimate(asked.tp, request)
    if file is not None:
        from deepspeed_autotp.cli.page.page import write_page

        write_page(file, subject, estimator, request, estimate)
    if asked.json:
        print(json.dumps(estimate.content(), indent=2))
    else:
        print_estimate(estimate, _planned(subject, asked.tp), console)


def _suggest(asked: argparse.Namespace, config: dict[str, Any], console: Console) -> None:
    if asked.gpus is None or asked.gpu_memory is None:
        raise ValueError("--suggest: expected --gpus 16 --gpu-memory 80GiB or the like beside it")
    for option in ("tp", "dp", "zero", "html"):
        if vars(asked)[option] is not None:
            raise ValueError(f"--{option}: got it with --suggest, which tries all, expected one")
    memory = bytes_of(asked.gpu_memory, "--gpu-memory")
    asked.bandwidth = asked.bandwidth or _DEFAULT_BANDWIDTH
    asked.seq = asked.seq or 4096
    request = _request(asked, config)

    from deepspeed_autotp.cli.plan_report import print_suggestion
    from deepspeed_autotp.estimate.estimator import Estimator
    from deepspeed_autotp.estimate.suggest import suggest

    subject = _subject(asked, config)
    found = suggest(
        Estimator(subject),
        request,
        model=asked.model,
        gpus=asked.gpus,
        memory=memory,
        most_ranks=_MOST_RANKS,
    )
    if asked.json:
        print(json.dumps(found.content(), indent=2))
    else:
        print_suggestion(found, console)


def _request(asked: argparse.Namespace, config: dict[str, Any]) -> Request:
    from deepspeed_autotp.estimate.estimator import Request
    from deepspeed_autotp.estimate.trace_result import Shape

    stage, zero = zero_options(config)
    optimizer = (asked.optimizer or optimizer_of(config)).lower()
    _core.optimizer_states(optimizer)
    return Request(
        replicas=asked.dp or 1,
        stage=stage if asked.zero is None else asked.zero,
        optimizer=optimizer,
        shape=None if asked.seq is None else Shape(asked.micro_batch or 1, asked.seq),
        bandwidth=None if asked.bandwidth is None else bandwidth_of(asked.bandwidth),
        checkpointing=asked.gradient_checkpointing,
        lora=asked.lora,
        zero=zero,
        accumulates=accumulates(config),
        left_out=left_out(config),
    )


def _subject(asked: argparse.Namespace, config: dict[str, Any]) -> Subject:
    given = vars(asked)
    tp, least = given["tp"], 2
    if tp is not None and tp < least:
        raise ValueError(f"--tp: got {tp}, expected {least} or more")
    lora = lora_of(given.get("lora"))

    from deepspeed_autotp.config.dtype_names import canonical_dtype, config_dtype
    from deepspeed_autotp.config.tp_section import TPSection, section_of
    from deepspeed_autotp.estimate.changes import Changes
    from deepspeed_autotp.estimate.model_cache import ModelCache
    from deepspeed_autotp.estimate.subject import Subject

    dtype = config_dtype(config)
    if asked.dtype is not None:
        dtype = canonical_dtype(asked.dtype, "--dtype")
    changes = Changes(dtype, bool(given.get("gradient_checkpointing")), lora)
    section = dict(TPSection(**section_of(config)))
    return Subject(asked.model, section, changes, cache=ModelCache.of_environment())


def _planned(subject: Subject, ranks: int) -> Plan:
    plan = subject.plan(ranks)
    assert plan is not None, "a TP size of 1"
    return plan


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
    from deepspeed_autotp.planning.plan_words import explanation

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, words in explanation(plan, entry):
        table.add_row(title, escape(words))
    return table
