# SPDX-License-Identifier: Apache-2.0
"""The commands about checkpoints: ``inspect``, ``merge`` and ``reshard``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepspeed_autotp.base.printable import printable
from deepspeed_autotp.checkpoint.merge import merge
from deepspeed_autotp.checkpoint.open_checkpoint import checkpoint_folder
from deepspeed_autotp.checkpoint.reshard_files import reshard
from deepspeed_autotp.checkpoint.summary import Summary, summarize
from deepspeed_autotp.cli.arguments import DONE, WRONG
from deepspeed_autotp.interop.progress_bars import progress_bar

_GB = 10**9


def run(asked: argparse.Namespace, console: Console) -> int:
    """Run a command; the exit status. ValueError and OSError say what is wrong."""
    if asked.command == "inspect":
        summary = summarize(asked.checkpoint)
        if asked.json:
            print(summary.json())
        else:
            console.print(_table(summary))
        return WRONG if summary.problem else DONE
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
    return DONE


def _refuse_zeros(asked: argparse.Namespace, names: Iterable[str]) -> None:
    for name, value in vars(asked).items():
        if name in names and value is not None and value < 1:
            raise ValueError(f"--{name}: got {value}, expected 1 or more")


def _table(summary: Summary) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, value in _rows(summary):
        table.add_row(title, escape(printable(str(value))))
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
