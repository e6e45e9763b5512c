# SPDX-License-Identifier: Apache-2.0
"""What the package logs, and where: ``AUTOTP_LOG`` sets the level.

As DeepSpeed does, rank 0 prints what was done from INFO on. A script that has set up ``logging``
for itself, by handlers of the root logger or by a handler or a level of ``deepspeed_autotp``, is
left to what it has set up, unless ``AUTOTP_LOG`` says otherwise.
"""

from __future__ import annotations

import logging
import os
import sys

from deepspeed_autotp import _core

_NAME = "deepspeed_autotp"
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_FORMAT = "[%(asctime)s] [%(levelname)s] [autotp] %(message)s"


class _OwnHandler(logging.Handler):
    """Prints to standard error as long as nothing else does."""

    def emit(self, record: logging.LogRecord) -> None:
        others = [each for each in logging.getLogger(_NAME).handlers if each is not self]
        if not others and not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr)


def check_environment() -> None:
    """ValueError unless ``AUTOTP_LOG`` is a level or unset."""
    value = os.environ.get("AUTOTP_LOG", "info")
    if value not in _LEVELS:
        near = _core.nearest(value, list(_LEVELS))
        raise ValueError(
            f"AUTOTP_LOG: got {value!r}, expected one of {', '.join(_LEVELS)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )


def set_up_logging(*, is_first: bool) -> None:
    """Let rank 0 of a run log from the level of ``AUTOTP_LOG`` on, or from INFO where
    logging is not set up. ``AUTOTP_LOG`` was checked."""
    logger = logging.getLogger(_NAME)
    asked = os.environ.get("AUTOTP_LOG")
    is_set_up = logger.level != logging.NOTSET or logger.handlers or logging.getLogger().handlers
    if not is_first or (asked is None and is_set_up):
        return
    logger.setLevel(_LEVELS.get(asked or "info", logging.INFO))
    if not any(isinstance(each, _OwnHandler) for each in logger.handlers):
        handler = _OwnHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
