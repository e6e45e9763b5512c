# SPDX-License-Identifier: Apache-2.0
"""docs/command-line.md from the parser of the command autotp."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from deepspeed_autotp.cli.main import build_parser

_BEGINNING = """\
# Command line

`make docs-pages` writes this page from the parser of `autotp`.

| exit code | means |
|---|---|
| 0 | done, and what was looked at is right |
| 1 | `check` or `inspect` has found that it is wrong |
| 2 | not done: an argument, a file or a configuration is wrong, and nothing was written |
| 130 | interrupted, and nothing was written |

`python -m deepspeed_autotp.cli` is the same command. `autotp --print-completion bash` prints a
script that completes commands, options and files (`zsh`, `fish` and `tcsh` as well): `autotp
--print-completion bash > ~/.local/share/bash-completion/completions/autotp`.
"""


def page() -> str:
    """The page: a section for each command, in the parser's order."""
    parser, _ = build_parser()
    return "".join([_BEGINNING, *(section(*each) for each in commands(parser))])


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Name, summary and parser of each command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words = {each.dest: each.help or "" for each in action._choices_actions}
            for name, command in action.choices.items():
                yield name, words.get(name, ""), command


def section(name: str, words: str, command: argparse.ArgumentParser) -> str:
    """A command: what it does, its example, and a table of its arguments."""
    arguments = [each for each in command._actions if each.dest != "help"]
    parts = [f"\n## autotp {name}\n\n{_sentence(words)}\n"]
    if command.description:
        parts.append(f"\n{_sentence(command.description)}\n")
    example = re.fullmatch(
        r"examples?:\s*(.+)", (command.epilog or "").partition("\n\n")[0].strip(), re.DOTALL
    )
    if example:
        lines = "\n".join(line.strip() for line in example[1].splitlines())
        parts.append(f"\n```bash\n{lines}\n```\n")
    if arguments:
        parts.append("\n| argument | default | what it does |\n|---|---|---|\n")
        parts += [_row(each) for each in arguments]
    return "".join(parts)


def _row(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if isinstance(value, tuple):
        value = " ".join(value)
    if action.choices is not None and action.metavar is None:
        value = ", ".join(map(str, action.choices))
    if action.option_strings:
        name = ", ".join(f"`{each}`" for each in action.option_strings)
        if action.nargs != 0:
            name += f" `{value}`"
    else:
        name = f"`{value}`"
    default = "required" if action.required else ""
    if not action.required and action.default not in (None, False, argparse.SUPPRESS):
        default = f"`{action.default}`"
    return f"| {name} | {default} | {_cell(_expanded(action))} |\n"


def _expanded(action: argparse.Action) -> str:
    """The help of an argument, with ``%(default)s`` filled in as argparse does."""
    text = action.help or ""
    return text % {**vars(action), "prog": "autotp"} if text else ""


def _sentence(words: str) -> str:
    words = " ".join(words.split())
    return f"{words[:1].upper()}{words[1:]}" + ("" if words.endswith((".", ":")) else ".")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
