# SPDX-License-Identifier: Apache-2.0
"""The messages that the package logs within a block."""

import logging


class LoggedMessages(logging.Handler):
    """Within it, the list of what the package logs from ``level`` on; NOTSET leaves its level."""

    def __init__(self, level: int = logging.NOTSET, *, form: str = "%(message)s") -> None:
        super().__init__(level)
        self.setFormatter(logging.Formatter(form))
        self._logger = logging.getLogger("deepspeed_autotp")
        self._level_before = self._logger.level
        self._messages: list[str] = []

    def __enter__(self) -> list[str]:
        self._logger.addHandler(self)
        self._logger.setLevel(self.level or self._level_before)
        return self._messages

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level_before)
        self._logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(self.format(record))


def logged_warnings() -> LoggedMessages:
    return LoggedMessages(logging.WARNING)
