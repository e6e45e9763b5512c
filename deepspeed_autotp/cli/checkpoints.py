# SPDX-License-Identifier: Apache-2.0
"""The commands about checkpoints: ``inspect``, ``merge`` and ``reshard``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepspeed_autotp.checkpoint.offline import checkpoint_folder, merge, reshard
from deepspeed_autotp.checkpoint.summary import Summary, summarize

_GB = 10**9


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers of ``autotp``."""
    command = commands.add_parser("inspect", help="say what a checkpoint holds")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("--json", action="store_true", help="print JSON")
    command = commands.add_parser(
        "merge", help="write the full weights of a checkpoint as from_pretrained loads them"
    )
    command.add_argument("checkpoint", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument(
        "--config", type=Path, help="folder with config.json, where the checkpoint has none"
    )
    command.add_argument(
        "--master", action="store_true", help="the float32 weights of the optimizer"
    )
    command.add_argument(
        "--max-file-gb", type=float, default=5.0, help="most that a file has (default 5)"
    )
    command = commands.add_parser(
        "reshard", help="write a checkpoint at TP size 1, or with other data-parallel ranks"
    )
    command.add_argument("checkpoint", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--tp", type=int, required=True, help="TP size")
    command.add_argument("--dp", type=int, help="data-parallel ranks (default: as saved)")


def run(asked: argparse.Namespace, console: Console) -> int:
    """Run a command; the exit status. ValueError and OSError say what is wrong."""
    if asked.command == "inspect":
        summary = summarize(asked.checkpoint)
        if asked.json:
            print(summary.json())
        else:
            console.print(_table(summary))
        return 1 if summary.problem else 0
    folder = checkpoint_folder(asked.checkpoint)
    if asked.command == "merge":
        merge(
            folder,
            asked.out,
            config=asked.config,
            master=asked.master,
            max_file_bytes=int(asked.max_file_gb * _GB),
            shown=_shown,
        )
    else:
        if asked.tp < 1 or (asked.dp is not None and asked.dp < 1):
            raise ValueError(f"--tp {asked.tp}, --dp {asked.dp}: expected sizes of 1 or more")
        reshard(folder, asked.out, tp=asked.tp, replicas=asked.dp, shown=_shown)
    return 0


def _table(summary: Summary) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, value in _rows(summary):
        table.add_row(title, escape(str(value)))
    return table


def _rows(summary: Summary) -> Iterable[tuple[str, object]]:
    yield "checkpoint", summary.folder
    yield "written by", f"{summary.written_by}, DeepSpeed {summary.deepspeed or 'not known'}"
    if summary.tp_size is not None:
        assert summary.parameters and summary.sharded is not None
        yield "ranks", f"TP size {summary.tp_size}, {summary.replicas} data-parallel"
        share = 100 * summary.sharded / summary.parameters
        yield (
            "parameters",
            f"{summary.parameters:,}, {share:.1f} % of them sharded, {summary.dtype}",
        )
        yield "optimizer", f"{summary.optimizer}: {', '.join(summary.states) or 'no states'}"
        yield "trained", f"{summary.steps} steps, {summary.samples} samples"
    yield "files", f"{summary.files}, {summary.nbytes / 2**20:.1f} MiB"
    yield "whole", f"no: {summary.problem}" if summary.problem else "yes"


def _shown(items: Sequence[str], title: str) -> Iterable[str]:
    """``items`` with a progress bar, where there is tqdm."""
    if importlib.util.find_spec("tqdm") is None:
        return items
    bar: Iterable[str] = importlib.import_module("tqdm").tqdm(items, desc=title, unit="")
    return bar
