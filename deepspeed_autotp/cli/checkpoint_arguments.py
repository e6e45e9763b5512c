# SPDX-License-Identifier: Apache-2.0
"""The arguments of the commands about checkpoints; what these do is in ``checkpoints``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


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
