# SPDX-License-Identifier: Apache-2.0
"""A call of everything that ``_core`` offers, and the same calls with one value that is wrong.

A value of an argument is made anew for each call of the table, so that its references can be
counted: none of them is a constant that others refer to.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepspeed_autotp import _core
from deepspeed_autotp._core import Model, Pattern, Plan, Records, Rules
from tests.support.core_llama import HEADS, ROOT_MODULE, llama, preset


@dataclass(frozen=True, slots=True)
class Call:
    """``function(*args, **named)``; ``covers`` is what of ``_core`` it calls."""

    covers: str
    function: Callable[..., object]
    args: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        values = [*map(repr, self.args), *(f"{key}={value!r}" for key, value in self.named.items())]
        return f"{self.covers}({', '.join(values)})"[:300]


def calls() -> list[Call]:
    """Calls that are right: each function, constructor, method and property."""
    return [*_functions(), *_constructors(), *_methods(), *_properties()]


def wrong_calls(call: Call) -> Iterator[Call]:
    """``call`` with one value, within lists, tuples and mappings too, in the place of each."""
    for args in _with_one_wrong(call.args):
        yield Call(call.covers, call.function, args, call.named)
    for named in _with_one_wrong(call.named):
        yield Call(call.covers, call.function, call.args, named)


def _text(text: str) -> str:
    """A string that nothing else refers to."""
    return "".join(list(text))


def _functions() -> Iterator[Call]:
    shape = [[8, 4, 4], -1]
    slices = [(0, 1 << 40, 4, (8, 1000), (0, 10), (8, 500), 0, (500, 1))]
    candidates = [(2, 4, 1, 1 << 40, 0.25), (4, 2, 1, 1 << 39, 0.5)]
    parts = [((1000, 2000), [(1500, 2500), (3000, 1000)], 3)]
    given: dict[str, tuple[Any, ...]] = {
        "split": (97, 1, 4),
        "split_grain": (97, 32, 2),
        "index_pattern": (_text("layers.3.mlp"),),
        "optimizer_states": (_text("adamw"),),
        "collective_seconds": (_text("all-reduce"), 1 << 30, 4, 1.5e9),
        "order_layouts": (candidates, 1 << 41),
        "timeline_peak": (parts, 0.5),
        "activation_formula": (24, 2048, 1000, 4, 2, True, False),
        "nearest": (_text("lama"), [_text("llama"), _text("lamb")], 1000),
        "dtype_name": (_text("bf16"), _text("here")),
        "precision": (True, False),
        "family_blocks": (),
        "preset_names": (),
        "preset_rows": (_text("llama"),),
        "style_names": (),
        "style_spec": (_text("colwise"), _text("q_proj")),
        "check_spec": ({_text("shape"): shape, _text("partition_dim"): 0}, _text("here")),
        "core_info": (),
        "merge": ((2000, _text("bfloat16"), 1 << 40, 2000),),
        "settle_tp_size": ([(_text("first"), 2000), (_text("second"), 2000)],),
        "plan_reads": (slices, 1000),
        "reshard": ([[0, 1000], [1000, 1000]], [500, 1000]),
    }
    for name, args in given.items():
        yield Call(name, vars(_core)[name], args)
    yield Call(
        "merge",
        _core.merge,
        ((2000, _text("bfloat16"), 1 << 40, 2000),),
        {
            "autotp_size": 2000,
            "tp_size": 2000,
            "tp_group": 1 << 40,
            "tp_group_size": 2000,
            "section": _text("tp"),
            "dtype": _text("bf16"),
            "bf16": True,
            "fp16": False,
            "has_mpu": False,
            "has_mesh": False,
        },
    )


def _constructors() -> Iterator[Call]:
    modules = [
        ROOT_MODULE,
        (_text("up"), _text("Linear"), _text("linear"), {_text("out_features"): 4000}),
    ]
    parameters = [(_text("up.weight"), _text("weight"), 1, (4000, 64), _text("float32"), 4, -1)]
    yield Call(
        "Model",
        Model,
        (modules, parameters),
        {
            "model_type": _text("llama"),
            "prefix": _text("model"),
            "takes_labels": True,
            "integers": {_text("hidden_size"): 4000},
            "input_embedding": -1,
            "output_head": 1,
        },
    )
    for text in (r"layers\.\d+", r"(?P<a>x)(?P=a)"):  # of PCRE2, and of Python's re
        yield Call("Pattern", Pattern, (_text(text),))
    yield Call("Records", Records)
    yield Call("Rules", Rules)
    yield Call("Plan", Plan, (llama(layers=1), preset()), {"ranks": 2})
    yield Call(
        "Plan",
        Plan,
        (llama(layers=1, key_heads=HEADS), preset()),
        {
            "ranks": 2,
            "grain": 16,
            "strict": False,
            "defaults": True,
            "embedding_dim": 1,
            "head_patterns": [_text("lm_head")],
            "replicated": [_text("model.layers.*.mlp")],
            "individual": [_text("model.layers.*.self_attn")],
            "families": True,
            "heuristics": True,
            "large_layers": True,
            "large_names": [_text("lm_head")],
            "sequence_parallel": False,
            "all_tokens": [],
            "vocab_parallel_lm_head": None,
            "expert_partition": _text("width"),
            "must_shard": True,
        },
    )


def _methods() -> Iterator[Call]:
    for text in (r"layers\.\d+", r"(?P<a>x)(?P=a)"):
        yield Call("Pattern.match", Pattern(text).match, (_text("layers.1"),))
    records = Records()
    record = (1 << 40, 2000, _text("bfloat16"), 1 << 41, 2000)
    yield Call("Records.add", records.add, record)
    yield Call("Records.find", records.find, (1 << 40,))
    yield Call("Records.latest", records.latest)
    yield Call("Records.remove", records.remove, (1 << 42,))
    yield Call("Records.__len__", records.__len__)
    yield Call("Records.clear", Records().clear)
    for patterns in ([_text("a"), _text("b")], [_text("(?P<a>x)(?P=a)")]):
        named = {"label": _text("rule"), "model_types": [_text("llama")], "source": _text("preset")}
        yield Call("Rules.add", _into_new("add"), (patterns, {_text("shape"): [2, -1]}), named)
    yield Call("Rules.add_preset", _into_new("add_preset"), (_text("llama"),))
    style = (_text("layers.*.q_proj"), _text("colwise"))
    yield Call("Rules.add_style", _into_new("add_style"), style, {"required": True})
    name = _text("model.layers.0.self_attn.q_proj.weight")
    yield Call("Rules.find", preset().find, (name, _text("q_proj"), _text("llama"), _text("x.")))
    yield Call("Rules.__len__", preset().__len__)
    plan = Plan(llama(layers=1), preset(), ranks=2)
    yield Call("Plan.table", plan.table)
    yield Call("Plan.form_difference", plan.form_difference, (Plan(llama(), preset(), ranks=4),))
    yield Call("Plan.replicated_warning", plan.replicated_warning)
    memory = {
        "stage": 3,
        "replicas": 2000,
        "states": 2,
        "trains": [True] * len(plan.entries),
        "reduce_bucket": 1 << 30,
        "persistence": 1 << 20,
        "max_live": 1 << 30,
        "sub_group": 1 << 30,
        "overlap_comm": True,
    }
    yield Call("Plan.rank_memory", plan.rank_memory, (1,), memory)
    for entry in (plan.entries[2], plan.entries[1]):  # one that is shared, and another
        for method in ("local_shape", "width", "runs", "is_counted", "shared"):
            yield Call(f"Entry.{method}", getattr(entry, method), (1,))
        yield Call("Entry.chunks", entry.chunks, (1, 0, 4))
        yield Call("Entry.blocks", entry.blocks, (1, 4))


def _into_new(method: str) -> Callable[..., object]:
    """A method of Rules, called on new ones: what is added stays."""
    return lambda *args, **named: getattr(Rules(), method)(*args, **named)


def _properties() -> Iterator[Call]:
    """Of an object of each type, also its representation."""
    shards = Plan(llama(layers=1, key_heads=1), preset(), ranks=2)
    tokens = Plan(llama(layers=2), preset(), ranks=2, sequence_parallel=True)
    objects: list[Any] = [shards, tokens, *shards.entries, *shards.layers, *shards.integers]
    objects += [*tokens.stacks, *shards.table(), preset(), Records()]
    objects += [Pattern("a"), Pattern("(?P<a>x)(?P=a)"), llama()]
    for each in objects:
        kind = type(each)
        yield Call(f"{kind.__name__}.__repr__", each.__repr__)
        for name in properties(kind):
            yield Call(f"{kind.__name__}.{name}", getattr, (each, name))


def properties(kind: type) -> list[str]:
    """The names of what an object of a type has, but its methods."""
    return [name for name, value in vars(kind).items() if _is_property(name, value)]


def _is_property(name: str, value: object) -> bool:
    return not name.startswith("__") and not callable(value)


def _with_one_wrong(values: Any) -> Iterator[Any]:
    """``values`` with another value in the place of each that is in it, and of each of those."""
    places = values.items() if isinstance(values, Mapping) else enumerate(values)
    for place, value in list(places):
        inner = _with_one_wrong(value) if _is_container(value) else iter(())
        for other in (*_others(), *inner):
            yield _replaced(values, place, other)


def _is_container(value: object) -> bool:
    return isinstance(value, (Mapping, Sequence)) and not isinstance(value, str)


def _others() -> list[Any]:
    """Of another type, and of the right one with a value that is wrong for most."""
    return [object(), None, 1 << 70, _text("a\0b"), _text("\ud800"), [object()], -5]


def _replaced(values: Any, place: Any, other: object) -> Any:
    changed = copy.copy(values) if isinstance(values, (dict, list)) else list(values)
    changed[place] = other
    return type(values)(changed)
