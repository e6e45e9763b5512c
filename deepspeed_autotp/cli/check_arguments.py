# SPDX-License-Identifier: Apache-2.0
"""The arguments of ``autotp check``; what it does is in ``check``."""

from __future__ import annotations

from typing import Any

from deepspeed_autotp.interop.model_forms import FORMS

_STEPS = 3
_TIMEOUT = 600.0


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of ``autotp``."""
    command = commands.add_parser(
        "check",
        help="train a small model of the same kind sharded and in one process, and compare",
        description="Trains a small model of the same class and plan a few steps on local "
        "processes, sharded, and in one process, and compares losses, outputs and gradients of "
        "each module, and the weights afterwards. Needs no GPU and no weights. The exit code is 1 "
        "where they differ by more than rounding, or the model cannot be sharded so.",
        epilog="example: autotp check llama --tp 2",
    )
    command.add_argument("model", metavar="MODEL", help=FORMS)
    command.add_argument("--tp", type=int, required=True, help="TP size, 2 or more")
    command.add_argument("--config", help="a DeepSpeed configuration, for its rules")
    command.add_argument(
        "--inputs",
        metavar="MODULE:FUNCTION",
        help="returns keyword arguments of the model, which is then trained itself",
    )
    command.add_argument("--steps", type=int, default=_STEPS, help=f"default {_STEPS}")
    command.add_argument(
        "--dtype", default="float32", help="data type of the weights (default float32)"
    )
    command.add_argument(
        "--timeout", type=float, default=_TIMEOUT, help=f"seconds (default {_TIMEOUT:g})"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
