# SPDX-License-Identifier: Apache-2.0
"""The messages that the package logs within a block."""

import logging


class LoggedMessages(logging.Handler):
    """Within it, the list of the package's messages from ``level`` on."""

    def __init__(self, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self._messages: list[str] = []

    def __enter__(self) -> list[str]:
        logging.getLogger("deepspeed_autotp").addHandler(self)
        return self._messages

    def __exit__(self, *_: object) -> None:
        logging.getLogger("deepspeed_autotp").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


def logged_warnings() -> LoggedMessages:
    return LoggedMessages(logging.WARNING)
