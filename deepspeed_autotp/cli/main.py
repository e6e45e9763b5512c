# SPDX-License-Identifier: Apache-2.0
"""The command ``autotp``, also ``python -m deepspeed_autotp.cli``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

import shtab
from rich.console import Console

import deepspeed_autotp
from deepspeed_autotp.base.printable import printable_lines
from deepspeed_autotp.cli import check_arguments, checkpoint_arguments, plan
from deepspeed_autotp.cli.arguments import DONE, INTERRUPTED, NOT_DONE, Parser, near
from deepspeed_autotp.config import logs

_DESCRIPTION = "Tensor parallelism for training: plans, checks and checkpoints."
_EXAMPLE = "example: autotp plan llama:hidden_size=8192,num_hidden_layers=80 --tp 8"
_COMPLETION = "--print-completion"
# They know the arguments of all commands.
_MODULES = (plan, check_arguments, checkpoint_arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        asked = _parsed(given)
    except SystemExit as end:  # of argparse, which has said why
        return end.code if isinstance(end.code, int) else NOT_DONE
    # Where the output is not a terminal, as in a report that is pasted, lines are not folded.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    try:
        if "AUTOTP_LOG" in os.environ:
            logs.check_environment()
            logs.set_up_logging(is_first=True)
        return _run(asked, console)
    except BrokenPipeError:  # as of `autotp plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except ImportError as error:
        print(f"autotp {asked.command}: {error}: pip install {error.name}", file=sys.stderr)
        return NOT_DONE
    except (ValueError, OSError) as error:
        print(f"autotp {asked.command}: {printable_lines(str(error))}", file=sys.stderr)
        return NOT_DONE
    except KeyboardInterrupt:
        print(f"autotp {asked.command}: interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED


def _run(asked: argparse.Namespace, console: Console) -> int:
    """Each command imports what it needs alone: torch and its friends take seconds."""
    if asked.command in plan.COMMANDS:
        return plan.run(asked, console)
    if asked.command == "doctor":
        from deepspeed_autotp.cli.doctor import examined_table

        console.print(examined_table())
        return DONE
    if asked.command == "check":
        from deepspeed_autotp.cli import check

        return check.run(asked, console)
    from deepspeed_autotp.cli import checkpoints

    return checkpoints.run(asked, console)


def _parsed(given: Sequence[str]) -> argparse.Namespace:
    """The arguments; ends the program as argparse does where one is wrong."""
    parser, commands = build_parser()
    at = next((at for at, each in enumerate(given) if not each.startswith("-")), len(given))
    parser.refuse_unknown(given[:at])
    if at < len(given) and not any(each.startswith(_COMPLETION) for each in given[:at]):
        command = given[at]
        if command not in commands:
            expected = ", ".join(commands)
            hint = near(command, list(commands))
            parser.error(f"unknown command {command!r}, expected one of {expected}{hint}")
        commands[command].refuse_unknown(given[at + 1 :])
    return parser.parse_args(given)


def build_parser() -> tuple[Parser, Mapping[str, Parser]]:
    """The parser, and those of the commands; docs/command-line.md is made of them."""
    parser = Parser(prog="autotp", description=_DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument(
        "--version", action="version", version=f"autotp {deepspeed_autotp.__version__}"
    )
    shtab.add_argument_to(
        parser, [_COMPLETION], help="print a script that completes commands in this shell"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser(
        "doctor",
        help="say what is installed, how it was built and what would be used here",
        epilog="example: autotp doctor",
    )
    for module in _MODULES:
        module.add_commands(commands)
    return parser, commands.choices
