# SPDX-License-Identifier: Apache-2.0
"""Sections of a configuration as pydantic classes that raise ConfigProblems."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Self, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, TypeAdapter, ValidationError

from deepspeed_autotp.config.validation import (
    ConfigProblems,
    dictionary,
    problems,
    shown,
    unknown_key,
)

__all__ = ["Section", "is_auto", "read_dataclass", "readable"]

T = TypeVar("T")


class Section(BaseModel):
    """A section that DeepSpeed has, too. As there, "auto" leaves a field at its default, but for
    own fields that name it as a choice, in ``_auto``."""

    model_config = ConfigDict(
        validate_assignment=True,
        populate_by_name=True,
        extra="forbid",
        arbitrary_types_allowed=True,
    )

    _where: ClassVar[str] = ""
    _auto: ClassVar[tuple[str, ...]] = ()

    def __init__(self, /, **data: Any) -> None:
        known = self._spellings()
        given = {
            key: value
            for key, value in data.items()
            if key not in known or not is_auto(value) or known[key] in self._auto
        }
        lines = self._without_doubles(given, known)
        lines += [f"{key}: {unknown_key(key, list(known))}" for key in given if key not in known]
        lines += self._move(given := {key: given[key] for key in given if key in known})
        try:
            super().__init__(**given)
        except ValidationError as error:
            lines += problems(error)
        else:
            lines += self._contradictions()
        if lines:
            raise ConfigProblems(self._where, lines)

    @classmethod
    def read(cls, value: object) -> Self:
        """A section as it is, or one of the keys of a dictionary; None has no keys."""
        if isinstance(value, cls):
            return value
        return cls(**dictionary({} if value is None else value, cls._where))

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            if name not in type(self).model_fields:
                raise ConfigProblems(
                    self._where, [f"{name}: {unknown_key(name, list(type(self).model_fields))}"]
                )
            super().__setattr__(name, value)
        except ValidationError as error:
            raise ConfigProblems(self._where, problems(error)) from None

    @classmethod
    def _spellings(cls) -> dict[str, str]:
        """The name of the field for each key that may be written."""
        known: dict[str, str] = {}
        for name, field in cls.model_fields.items():
            known[name] = name
            if isinstance(field.validation_alias, AliasChoices):
                known |= {str(alias): name for alias in field.validation_alias.choices}
        return known

    @staticmethod
    def _without_doubles(given: dict[str, Any], known: dict[str, str]) -> list[str]:
        """Take out second spellings of a key; lines for those with another value."""
        lines = []
        first: dict[str, str] = {}
        for key in [key for key in given if key in known]:
            held = first.setdefault(known[key], key)
            if held == key:
                continue
            value = given.pop(key)
            if value != given[held]:
                lines.append(
                    f"{key}: got {shown(value)}, but {held}, another spelling of it, is "
                    f"{shown(given[held])}; write one of them"
                )
        return lines

    def _move(self, given: dict[str, Any]) -> list[str]:
        """Take out of `given` what is stored in another section; lines for what is wrong."""
        return []

    def _contradictions(self) -> list[str]:
        """Lines for values that are right by themselves but not together."""
        return []


def is_auto(value: object) -> bool:
    return isinstance(value, str) and value == "auto"


def readable(cls: type[T]) -> type[T]:
    """Let a pydantic dataclass raise ConfigProblems; a call of the wrong form is a TypeError."""
    create, signature = cls.__init__, inspect.signature(cls)

    def init(self: T, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{cls.__name__}: {error}") from None
        try:
            create(self, **given)
        except ValidationError as error:
            raise ConfigProblems(cls.__name__, problems(error)) from None

    type.__setattr__(cls, "__init__", init)
    return cls


def read_dataclass(cls: type[T], given: object, *, where: str, context: Any = None) -> T:
    """A pydantic dataclass from a dictionary; ConfigProblems of `where` otherwise."""
    values = dictionary(given, where)
    try:
        return TypeAdapter(cls).validate_python(values, context=context)
    except ValidationError as error:
        known = list(inspect.signature(cls).parameters)
        raise ConfigProblems(where, problems(error, known)) from None
