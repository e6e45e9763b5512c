# SPDX-License-Identifier: Apache-2.0
"""docs/configuration.md from the classes that read a configuration, and from the core's tables."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import AliasChoices
from pydantic_core import PydanticUndefined

from deepspeed_autotp import AutoTPConfig, PartitionType, TPConfig, TPLayerSpec, TPTrainingConfig
from deepspeed_autotp._core import family_blocks, preset_names, preset_rows, style_names, style_spec

# Heading, class, and what stands before its keys.
SECTIONS: tuple[tuple[str, type[Any], str], ...] = (
    ("Keys of `tensor_parallel`", TPTrainingConfig, ""),
    ("Keys of the nested section", TPConfig, "tp."),
    ("Keys of `partition_config`", AutoTPConfig, "partition_config."),
    ("Keys of a rule", TPLayerSpec, "layer_specs[]."),
)
# Which may stand in the outer section, too.
_MOVED = {"tp.tp_grain_size": "tp_grain_size"}
_MISSING = (dataclasses.MISSING, PydanticUndefined)
_WORDS = {
    bool: "true or false",
    int: "integer",
    str: "text",
    torch.dtype: "data type",
    TPConfig: "section",
    TPLayerSpec: "rule",
    PartitionType: " or ".join(f'`"{each.value}"`' for each in PartitionType),
}

_PLURALS = {"integer": "integers", "text": "texts", "rule": "rules"}

_BEGINNING = """\
# Configuration

`make docs-pages` writes this page from the code.

The section `tensor_parallel` of a DeepSpeed configuration, which is also the `config` of
`parallelize` and `from_pretrained` (without `dtype`, `tp.mpu` and `tp.tp_group`). An unknown key,
preset, data type or style is an error that names the nearest known ones; `"auto"` leaves a key of
`tensor_parallel` or `tp` at its default, and as `autotp_size` takes what `tp_model_init` recorded.
Defaults are written as JSON.

[options.md](options.md) has the other sections of a DeepSpeed configuration, [how a plan is
made](how-a-plan-is-made.md#rules-of-your-own) an example of rules.
"""
_KEYS = "| key | type | default | what it does |\n|---|---|---|---|\n"
_PRESETS = """
## Presets

What `preset_model` names; the first pattern that matches the name of a parameter decides. A fused
q|k|v has no `shape`: its pieces follow from the head counts.
"""
_STYLES = """
## Styles of a `tp_plan`

A `tp_plan`, of a transformers model or of one of yours, gives a style to names of modules.

| style | as a rule |
|---|---|
"""
_BLOCKS = """
## Names of layers

Without rules and `tp_plan`, layers that stand beside one another under these names are sharded
together, where their sizes fit: the output as `row`, the inputs as `column`. The first that fits
decides.

| output | inputs | heads | model type |
|---|---|---|---|
"""


def page() -> str:
    """The page."""
    parts = [_BEGINNING]
    for heading, section, prefix in SECTIONS:
        parts.append(
            f"\n## {heading}\n\n| key | type | default | what it does |\n|---|---|---|---|\n"
        )
        parts += _rows(section, prefix)
    parts.append(_PRESETS)
    for name in preset_names():
        parts.append(f"\n### {name}\n\n| pattern | as a rule |\n|---|---|\n")
        parts += [
            f"| `{_cell(pattern)}` | {_rule(spec)} |\n" for pattern, spec in preset_rows(name)
        ]
    parts.append(_STYLES)
    parts += [f"| `{name}` | {_style(name)} |\n" for name in style_names()]
    parts.append(_BLOCKS)
    for output, inputs, heads, model_type in family_blocks():
        names = ", ".join(f"`{each}`" for each in inputs)
        parts.append(f"| `{output}` | {names} | {'yes' if heads else ''} | {model_type or ''} |\n")
    return "".join(parts)


def _rows(section: type[Any], prefix: str) -> Iterator[str]:
    words = meanings(section)
    hints = typing.get_type_hints(section)
    known = {name: each for name, *each in fields(section)}
    for name in words:
        default, spellings = known[name]
        keys = [prefix + name, *(prefix + each for each in spellings)]
        keys += [_MOVED[key] for key in keys if key in _MOVED]
        spelled = " or ".join(f"`{key}`" for key in keys)
        shown = "required" if default in _MISSING else f"`{as_json(default)}`"
        yield f"| {spelled} | {_type(hints[name])} | {shown} | {_cell(words[name])} |\n"


def fields(section: type[Any]) -> Iterator[tuple[str, Any, list[str]]]:
    """Name, default and other spellings of each key of a section."""
    if dataclasses.is_dataclass(section):
        for field in dataclasses.fields(section):
            if field.init:
                made = field.default_factory
                default = field.default if made is dataclasses.MISSING else made()
                yield field.name, default, []
        return
    for name, field in section.model_fields.items():
        alias = field.validation_alias
        choices = alias.choices if isinstance(alias, AliasChoices) else []
        others = [str(each) for each in choices if each != name]
        yield name, field.get_default(call_default_factory=True), others


def meanings(section: type[Any]) -> dict[str, str]:
    """What the class's docstring says of each key: a list with the names in the first column."""
    found: dict[str, str] = {}
    names = {name for name, _, _ in fields(section)}
    last = ""
    for line in inspect.cleandoc(section.__doc__ or "").splitlines():
        first, _, rest = line.partition(" ")
        if first in names and (not rest or re.match(rf"{first} +\S", line)):
            last = first
            found[last] = rest.strip()
        elif last and line.startswith("  "):
            found[last] = f"{found[last]} {line.strip()}".strip()
        else:
            last = ""
    return found


def _type(hint: Any) -> str:
    """A type as one would say it."""
    if typing.get_origin(hint) is typing.Annotated:
        return _type(typing.get_args(hint)[0])
    arguments = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Literal:
            return " or ".join(f"`{as_json(each)}`" for each in arguments)
        case types.UnionType | typing.Union:
            return " or ".join(dict.fromkeys(_type(each) for each in arguments))
        case origin if origin in (list, tuple):
            return f"list of {_plural(arguments[0])}"
        case origin if origin is dict:
            return "section"
    if hint in (None, type(None)):
        return "`null`"
    return "object" if hint is Any else _WORDS[hint]


def _plural(hint: Any) -> str:
    words = _type(hint).split(" or ")
    return " or ".join(_PLURALS.get(each) or each.replace("list", "lists", 1) for each in words)


def as_json(value: object) -> str:
    """A default as a configuration has it."""
    match value:
        case torch.dtype():
            value = str(value).removeprefix("torch.")
        case PartitionType():
            value = value.value
        case TPConfig():
            value = {}
    return json.dumps(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _style(name: str) -> str:
    try:
        return _rule(style_spec(name, ""))
    except ValueError:
        return "no weight is sharded by it alone"


def _rule(spec: dict[str, Any]) -> str:
    """A specification of the core in the words of a rule."""
    words = [f"`{spec['partition_type']}`"]
    if spec["shape"] is not None:
        words.append(f"`shape` `{json.dumps(spec['shape'])}`")
    if spec["partition_dim"] is not None and spec["shape"] is not None:
        words.append(f"`partition_dim` {spec['partition_dim']}")
    flags = {
        "gather_output": "`gather_output`",
        "split_input": "each rank takes its features of a full input",
        "sum_gradient": "`grad_allreduce`",
    }
    return ", ".join([*words, *(text for key, text in flags.items() if spec[key])])
