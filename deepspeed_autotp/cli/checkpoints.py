# SPDX-License-Identifier: Apache-2.0
"""The commands about checkpoints: ``inspect``, ``merge`` and ``reshard``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepspeed_autotp.checkpoint.merge import merge
from deepspeed_autotp.checkpoint.open_checkpoint import checkpoint_folder
from deepspeed_autotp.checkpoint.reshard_files import reshard
from deepspeed_autotp.checkpoint.summary import Summary, summarize
from deepspeed_autotp.interop.progress_bars import progress_bar

COMMANDS = ("inspect", "merge", "reshard")

_GB = 10**9


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers of ``autotp``."""
    command = commands.add_parser(
        "inspect",
        help="say what a checkpoint holds",
        epilog="example: autotp inspect out/checkpoint-500",
    )
    _add_checkpoint(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command = _writing(
        commands,
        "merge",
        "write the full weights of a checkpoint as from_pretrained loads them",
        "example: autotp merge out/checkpoint-500 full",
    )
    command.add_argument(
        "--master", action="store_true", help="the float32 weights of the optimizer"
    )
    command.add_argument(
        "--max-file-gb", type=float, default=5.0, help="most that a file has (default 5)"
    )
    command = _writing(
        commands,
        "reshard",
        "write a checkpoint as a run of another size would have saved it",
        "example: autotp reshard out/checkpoint-500 resharded --tp 4",
    )
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
    _refuse_zeros(asked, ("tp", "dp", "jobs"))
    if asked.command == "merge":
        if not 0 < asked.max_file_gb < math.inf:
            raise ValueError(
                f"--max-file-gb: got {asked.max_file_gb}, expected a size larger than 0, such as 5"
            )
        merge(
            folder,
            asked.out,
            config=asked.config,
            master=asked.master,
            max_file_bytes=int(asked.max_file_gb * _GB),
            jobs=asked.jobs,
            progress=progress_bar,
        )
    else:
        reshard(
            folder,
            asked.out,
            tp=asked.tp,
            replicas=asked.dp,
            config=asked.config,
            jobs=asked.jobs,
            progress=progress_bar,
        )
    return 0


def _writing(commands: Any, name: str, words: str, example: str) -> argparse.ArgumentParser:
    """A command that writes a folder."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=words, epilog=example)
    _add_checkpoint(command)
    command.add_argument("out", type=Path, help="new folder, which is written")
    command.add_argument(
        "--config",
        type=Path,
        help="config.json of the model, or its folder (default: that in the checkpoint)",
    )
    command.add_argument(
        "--jobs", type=int, help="processes (default: one for 2 GB, at most one for each CPU core)"
    )
    return command


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "checkpoint",
        type=Path,
        help="folder of a checkpoint, or of a run with the file 'latest'",
    )


def _refuse_zeros(asked: argparse.Namespace, names: Iterable[str]) -> None:
    for name, value in vars(asked).items():
        if name in names and value is not None and value < 1:
            raise ValueError(f"--{name}: got {value}, expected 1 or more")


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
        yield "model", summary.model or "not one of transformers, or not known"
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
