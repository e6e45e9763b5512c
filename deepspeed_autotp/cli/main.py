# SPDX-License-Identifier: Apache-2.0
"""The command ``autotp``, also ``python -m deepspeed_autotp.cli``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from deepspeed_autotp.cli import checkpoints, plan
from deepspeed_autotp.cli.doctor import examined_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(prog="autotp", description="Tensor parallelism for training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser(
        "doctor", help="say what is installed, how it was built and what would be used here"
    )
    plan.add_commands(commands)
    checkpoints.add_commands(commands)
    asked = parser.parse_args(arguments)
    # Where the output is not a terminal, as in a report that is pasted, lines are not folded.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    if asked.command == "doctor":
        console.print(examined_table())
        return 0
    try:
        run = plan.run if asked.command in plan.COMMANDS else checkpoints.run
        return run(asked, console)
    except (ValueError, OSError) as error:
        print(f"autotp {asked.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"autotp {asked.command}: interrupted, nothing was written", file=sys.stderr)
        return 130
