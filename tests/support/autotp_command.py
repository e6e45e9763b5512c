# SPDX-License-Identifier: Apache-2.0
"""The command ``autotp`` within a process."""

import contextlib
import io


def command(*arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of ``autotp``."""
    from deepspeed_autotp.cli.main import main

    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main(arguments)
    return status, out.getvalue(), errors.getvalue()
