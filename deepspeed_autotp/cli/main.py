# SPDX-License-Identifier: Apache-2.0
"""The command ``autotp``, also ``python -m deepspeed_autotp.cli``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from deepspeed_autotp.cli import checkpoint_arguments, plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(prog="autotp", description="Tensor parallelism for training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser(
        "doctor", help="say what is installed, how it was built and what would be used here"
    )
    plan.add_commands(commands)
    checkpoint_arguments.add_commands(commands)
    asked = parser.parse_args(arguments)
    # Where the output is not a terminal, as in a report that is pasted, lines are not folded.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    if asked.command == "doctor":
        from deepspeed_autotp.cli.doctor import examined_table

        console.print(examined_table())
        return 0
    try:
        if asked.command in plan.COMMANDS:
            return plan.run(asked, console)
        # Each command imports what it needs alone: torch and its friends take seconds.
        from deepspeed_autotp.cli import checkpoints

        return checkpoints.run(asked, console)
    except (ValueError, OSError) as error:
        print(f"autotp {asked.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"autotp {asked.command}: interrupted, nothing was written", file=sys.stderr)
        return 130
