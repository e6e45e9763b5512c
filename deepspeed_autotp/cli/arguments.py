# SPDX-License-Identifier: Apache-2.0
"""Arguments of commands: near names for unknown ones, an example and the exit codes in the help."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import shtab

from deepspeed_autotp import _core

# As ruff and argparse have them.
DONE, WRONG, NOT_DONE, INTERRUPTED = 0, 1, 2, 130

_WIDTH = 80

# Arguments that may be a file, and are text.
_FILES = ("model", "config", "html")

_EXIT_CODES = """exit codes:
  0  done, and what was looked at is right
  1  `check` or `inspect` has found that it is wrong
  2  not done: an argument, a file or a configuration is wrong, and nothing was written"""


class Parser(argparse.ArgumentParser):
    """``epilog`` has an example; the exit codes stand below it."""

    def __init__(
        self, *args: Any, description: str | None = None, epilog: str | None = None, **kwargs: Any
    ) -> None:
        # The lines of the epilog stay as they are, which argparse does for both or none.
        kwargs["description"] = textwrap.fill(description or "", _WIDTH)
        kwargs["formatter_class"] = argparse.RawDescriptionHelpFormatter
        kwargs["epilog"] = f"{epilog}\n\n{_EXIT_CODES}" if epilog else None
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        """As of argparse; notes what is completed by the names of files."""
        action = super().add_argument(*names, **kwargs)
        if action.type is Path or action.dest in _FILES:
            vars(action)["complete"] = shtab.FILE
        return action

    def refuse_unknown(self, arguments: Sequence[str]) -> None:
        """End with a message that has the near names where a flag is not known: argparse would say
        which other one is missing."""
        flags = ["--help", *re.findall(r"--[a-z][a-z-]*", self.format_usage())]
        for given in arguments:
            name = given.partition("=")[0]
            if name == "--":
                return
            if name.startswith("--") and name not in flags:
                self.error(f"unknown option {name}{near(name, flags)}")

    def error(self, message: str) -> NoReturn:
        """End with the message and where to look."""
        self.exit(NOT_DONE, f"{self.prog}: {message}\nsee {self.prog} --help\n")


def near(name: str, names: Sequence[str]) -> str:
    """What to say of the names that are near one that is not known, or nothing."""
    found = _core.nearest(name, list(names))
    return f"; did you mean {' or '.join(found)}?" if found else ""
