# SPDX-License-Identifier: Apache-2.0
"""Where the package logs, and from which level on."""

import logging
from collections.abc import Iterator

import pytest

from deepspeed_autotp.config.logs import check_environment, set_up_logging

LOGGER = logging.getLogger("deepspeed_autotp")


@pytest.fixture(autouse=True)
def _level_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("AUTOTP_LOG", raising=False)
    level = LOGGER.level
    yield
    LOGGER.setLevel(level)


def begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a script where nobody has set up logging; pytest adds handlers for each test."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(LOGGER, "handlers", [])
    LOGGER.setLevel(logging.NOTSET)


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The levels of what is printed of one message each."""
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        LOGGER.log(level, "%s", logging.getLevelName(level))
    return [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()]


def test_the_first_rank_prints_from_info_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(monkeypatch)
    set_up_logging(is_first=False)
    assert printed(capsys) == ["WARNING"]
    for _ in range(2):  # a second model adds nothing
        set_up_logging(is_first=True)
    assert printed(capsys) == ["INFO", "WARNING"]


@pytest.mark.parametrize(
    ("level", "expected"),
    [("debug", ["DEBUG", "INFO", "WARNING"]), ("warning", ["WARNING"]), ("error", [])],
)
def test_the_environment_sets_the_level(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    level: str,
    expected: list[str],
) -> None:
    begin(monkeypatch)
    monkeypatch.setenv("AUTOTP_LOG", level)
    set_up_logging(is_first=True)
    assert printed(capsys) == expected


def test_what_a_script_has_set_up_decides(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(monkeypatch)
    LOGGER.setLevel(logging.ERROR)
    set_up_logging(is_first=True)
    assert printed(capsys) == []
    LOGGER.setLevel(logging.NOTSET)
    logging.basicConfig(level=logging.WARNING, format="root %(message)s")
    set_up_logging(is_first=True)
    assert printed(capsys) == ["WARNING"]


def test_lines_are_not_printed_twice_where_logging_is_set_up_later(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(monkeypatch)
    set_up_logging(is_first=True)
    logging.basicConfig(format="root %(message)s")
    assert printed(capsys) == ["INFO", "WARNING"]


def test_another_level_is_refused_with_the_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    check_environment()
    monkeypatch.setenv("AUTOTP_LOG", "debg")
    with pytest.raises(ValueError, match=r"AUTOTP_LOG: got 'debg', expected one of .*mean debug"):
        check_environment()
