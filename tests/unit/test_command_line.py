# SPDX-License-Identifier: Apache-2.0
"""The command line: help, near names, exit codes and completion."""

import subprocess

import pytest

import deepspeed_autotp
from tests.support.autotp_command import command

COMMANDS = ("doctor", "plan", "explain", "check", "inspect", "merge", "reshard")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_an_example_and_the_exit_codes(name: str) -> None:
    status, out, _ = command(name, "--help")
    assert status == 0
    example = out.partition("example: ")[2].splitlines()[0]
    assert example.startswith(f"autotp {name}")
    assert [f"  {code}  " in out for code in (0, 1, 2)] == [True] * 3
    assert f"    {name} " in command("--help")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("chek", "llama"), "unknown command 'chek', expected one of doctor, plan"),
        (("chek", "llama"), "did you mean check?"),
        (("check", "llama", "--tpp", "2"), "autotp check: unknown option --tpp; did you mean --tp"),
        (("check", "llama", "--stepz=2", "--tp", "2"), "unknown option --stepz; did you mean"),
        (("check", "llama"), "required: --tp"),
        (("plan", "llama", "--tp", "two"), "invalid int value: 'two'"),
        (("plan", "llama", "--js", "--tp", "2"), "unknown option --js"),
        (("--verson",), "did you mean --version?"),
        ((), "required: command"),
        (("inspect", "/nowhere"), "'/nowhere' does not exist"),
    ],
)
def test_wrong_arguments_are_said_with_the_near_ones(
    arguments: tuple[str, ...], words: str
) -> None:
    status, out, errors = command(*arguments)
    assert (status, out) == (2, "")
    assert words in errors and "Traceback" not in errors


def test_bash_completes_commands_and_options() -> None:
    status, script, _ = command("--print-completion", "bash")
    assert status == 0
    for words, expected in (("autotp che", "check"), ("autotp check --st", "--steps")):
        count = len(words.split())
        lines = f"""
COMP_WORDS=({words}) COMP_CWORD={count - 1}
_shtab_autotp
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        done = subprocess.run(
            ["bash", "-c", f"complete() {{ :; }}\n{script}\n{lines}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.split() == [expected], done.stderr
    assert "compdef" in command("--print-completion", "zsh")[1]


def test_the_version_is_said() -> None:
    assert command("--version") == (0, f"autotp {deepspeed_autotp.__version__}\n", "")
