# SPDX-License-Identifier: Apache-2.0
"""docs/api.md from the signatures and docstrings of the public names."""

from __future__ import annotations

import ast
import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed_autotp
from tools.configuration_page import SECTIONS

_STUB = Path(deepspeed_autotp.__file__).with_suffix(".pyi")
_WIDTH = 100
# "name   what it is", or lines that are indented: their columns have to stay.
_COLUMNS = re.compile(r"\S {2,}\S|^ {2,}\S", re.MULTILINE)
# Whose arguments are keys that docs/configuration.md has.
_SECTIONS = {section: heading for heading, section, _ in SECTIONS}
_ROLE = re.compile(r":\w+:`~?([^`]+)`")

_BEGINNING = """\
# Python interface

`make docs-pages` writes this page from the code. All names are those of `deepspeed_autotp`; what a
name needs is imported when it is first used.

"""


def page() -> str:
    """The page: an index by module, then every name."""
    modules = public_names()
    parts = [_BEGINNING, "| module | names |\n|---|---|\n"]
    for module, names in modules.items():
        links = ", ".join(f"[`{name}`](#{_anchor(name)})" for name in names)
        parts.append(f"| `{module}` | {links} |\n")
    for names in modules.values():
        for name in names:
            parts += _section(name, getattr(deepspeed_autotp, name))
    return "".join(parts)


def public_names() -> dict[str, list[str]]:
    """The public names by the module that has them, as the stub of the package says."""
    found: dict[str, list[str]] = {}
    for line in ast.parse(_STUB.read_text()).body:
        if isinstance(line, ast.ImportFrom):
            names = [each.asname or each.name for each in line.names]
            found.setdefault(line.module or "", []).extend(names)
    return found


def _section(name: str, value: Any) -> Iterator[str]:
    yield f"\n## {name}\n"
    if inspect.isclass(value) and value in _SECTIONS:
        heading = _SECTIONS[value]
        yield _text(value, with_columns=False)
        yield f"\nArguments: [{heading}](configuration.md#{_anchor(heading)}).\n"
    else:
        yield _signature(name, value)
        yield _text(value)
    if not inspect.isclass(value) or issubclass(value, enum.Enum):
        return
    for member, function in _methods(value):
        yield f"\n### {name}.{member}\n"
        yield _signature(member, function)
        yield _text(function)


def _methods(cls: type[Any]) -> Iterator[tuple[str, Any]]:
    """Public functions and properties with a docstring that a class defines itself, or that a base
    does of which it has the docstring, too."""
    bases = [each for each in cls.__mro__ if each.__doc__ == cls.__doc__]
    for name, value in ((n, v) for each in bases for n, v in vars(each).items()):
        if name.startswith("_"):
            continue
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        function = function.fget if isinstance(function, property) else function
        if inspect.isfunction(function) and function.__doc__:
            yield name, value


def _signature(name: str, value: Any) -> str:
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        members = "\n".join(f"{name}.{each.name} = {each.value!r}" for each in value)
        return f"\n```text\n{members}\n```\n"
    if isinstance(value, property):
        returns = inspect.signature(value.fget).return_annotation  # type: ignore[arg-type]
        return f"\n```text\n{name}: {returns}\n```\n"
    function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    signature = _unquoted(inspect.signature(function))
    whole = f"{name}{signature}"
    if len(whole) > _WIDTH:
        whole = _folded(name, signature)
    return f"\n```text\n{whole}\n```\n"


class _Words(str):
    """An annotation that is shown as it was written."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _unquoted(signature: inspect.Signature) -> inspect.Signature:
    """The signature as a caller sees it, with annotations that are texts shown without quotes."""

    def shown(annotation: Any) -> Any:
        return _Words(annotation) if isinstance(annotation, str) else annotation

    parameters = [
        each.replace(annotation=shown(each.annotation))
        for name, each in signature.parameters.items()
        if name not in ("self", "cls")
    ]
    return signature.replace(
        parameters=parameters, return_annotation=shown(signature.return_annotation)
    )


def _folded(name: str, signature: inspect.Signature) -> str:
    """One parameter in each line."""
    lines, is_keyword = [], False
    for each in signature.parameters.values():
        if each.kind is each.KEYWORD_ONLY and not is_keyword:
            lines.append("    *,")
        is_keyword = is_keyword or each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        lines.append(f"    {each},")
    empty = signature.return_annotation is inspect.Signature.empty
    returns = "" if empty else f" -> {signature.return_annotation}"
    return "\n".join([f"{name}(", *lines, f"){returns}"])


def _text(value: Any, *, with_columns: bool = True) -> str:
    """A docstring as Markdown: what is laid out in columns as it is, or not at all."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    parts = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(value.__doc__ or "")):
        if not _COLUMNS.search(paragraph):
            parts.append(f"\n{_plain(paragraph)}\n")
        elif with_columns:
            parts.append(f"\n```text\n{paragraph}\n```\n")
    return "".join(parts)


def _plain(paragraph: str) -> str:
    return _ROLE.sub(r"`\1`", " ".join(paragraph.split()))


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
