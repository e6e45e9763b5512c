# SPDX-License-Identifier: Apache-2.0
"""A section of a configuration as a pydantic model with readable errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from deepspeed_autotp.config.validation import ConfigProblems, nest, shown, unknown_keys

__all__ = ["Section", "is_auto"]


class Section(BaseModel):
    """A section whose errors are a ConfigProblems, never pydantic's own wording.

    As in DeepSpeed, the value "auto" leaves a field at its default.
    """

    model_config = ConfigDict(
        validate_assignment=True,
        populate_by_name=True,
        extra="forbid",
        arbitrary_types_allowed=True,
    )

    _where: ClassVar[str] = ""
    # Second spellings of fields, and keys that a subclass takes out of the data itself.
    _aliases: ClassVar[Mapping[str, str]] = {}
    _moved: ClassVar[Sequence[str]] = ()

    def __init__(self, /, **data: Any) -> None:
        lines: list[str] = []
        values = self._arrange(data, lines)
        try:
            super().__init__(**values)
        except ValidationError as error:
            lines += _lines_of(error, self._spelled(data))
        else:
            lines += self._contradictions()
        if lines:
            raise ConfigProblems(self._where, lines)

    def __setattr__(self, name: str, value: Any) -> None:
        lines = unknown_keys([name], list(type(self).model_fields))
        if not lines:
            try:
                super().__setattr__(name, value)
            except ValidationError as error:
                lines = _lines_of(error, {})
        if lines:
            raise ConfigProblems(self._where, lines)

    @classmethod
    def _arrange(cls, data: Mapping[str, Any], lines: list[str]) -> dict[str, Any]:
        """The values under the names of the fields; what cannot be placed goes to `lines`."""
        values: dict[str, Any] = {}
        known = [*cls.model_fields, *cls._aliases, *cls._moved]
        lines += unknown_keys(data, known)
        for key, value in data.items():
            name = cls._aliases.get(key, key)
            if key not in known or is_auto(value):
                continue
            if name in values and values[name] != value:
                lines.append(
                    f"{key}: got {shown(value)}, but {cls._spelled(data)[name]}, another spelling "
                    f"of it, is {shown(values[name])}; write one of them"
                )
            values.setdefault(name, value)
        return values

    @classmethod
    def _spelled(cls, data: Mapping[str, Any]) -> dict[str, str]:
        """How each field was spelled; the first spelling, where there are two."""
        spelled: dict[str, str] = {}
        for key in data:
            spelled.setdefault(cls._aliases.get(key, key), key)
        return spelled

    def _contradictions(self) -> list[str]:
        """Lines for values that are right by themselves but not together."""
        return []


def is_auto(value: object) -> bool:
    return isinstance(value, str) and value == "auto"


def _lines_of(error: ValidationError, spelled: Mapping[str, str]) -> list[str]:
    """Our own words out of pydantic's error, under the spellings that the user chose."""
    lines: list[str] = []
    for problem in error.errors():
        name = str(problem["loc"][0])
        cause = problem["ctx"]["error"]
        key = spelled.get(name, name)
        lines += (
            nest(key, cause.lines) if isinstance(cause, ConfigProblems) else [f"{key}: {cause}"]
        )
    return lines
