# SPDX-License-Identifier: Apache-2.0
"""One layer specification: which parameters are cut, and how.

The class carries DeepSpeed's name, fields and defaults. The core checks a specification and
matches its patterns; here it is only written down.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepspeed_autotp import _core
from deepspeed_autotp.config.validation import (
    Check,
    ConfigProblems,
    check_all,
    flag,
    integer,
    sequence,
    shown,
    strings,
    wrong,
)

__all__ = ["PartitionType", "TPLayerSpec", "add_rule", "preset_spec"]

# Sizes are C integers of 64 bits.
_LARGEST_SIZE = 2**63 - 1

Shape = tuple[int | tuple[int, ...], ...]


class PartitionType(enum.Enum):
    """Which features of a layer are cut."""

    COLUMN = "column"  # output features; the gradient of the input is summed
    ROW = "row"  # input features; the output is summed
    SKIP = "skip"  # none: the layer stays whole on every rank


@dataclass
class TPLayerSpec:
    """How the parameters that match one of `patterns` are cut.

    patterns        regular expressions with the results of ``re.match`` on the parameter's name
    shape           the pieces of a fused weight: ``(2, -1)`` is two equal pieces along dim 0,
                    ``((q, k, v), -1)`` three of these sizes, in elements; -1 is inferred
    partition_dim   the dimension that is cut, of the weight as `shape` shows it; by default 0
                    for column and 1 for row
    model_types     the specification holds for these model types only, in any case
    gather_output   column: every rank receives the whole output
    grad_allreduce  skip: each rank holds a part of the gradient, and the parts are summed

    Raises ValueError that lists every field with a wrong value.
    """

    patterns: list[str]
    partition_type: PartitionType = PartitionType.COLUMN
    shape: Shape | None = None
    partition_dim: int | None = None
    model_types: list[str] | None = None
    gather_output: bool = False
    grad_allreduce: bool = False

    # Who wrote the specification and what a plan calls it; "" is the place in `layer_specs`.
    _source: str = field(default="partition_config", init=False, repr=False, compare=False)
    _label: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        lines = check_all(self.__dict__, SPEC_CHECKS)
        if not lines:
            try:
                _core.check_spec(_core_spec(self), "")
            except ValueError as error:
                lines.append(str(error))
        if lines:
            raise ConfigProblems("TPLayerSpec", lines)

    def matches(self, param_name: str, model_type: str | None = None) -> bool:
        """Whether a pattern matches at the start of the name, and the model type fits."""
        if self.model_types:
            known = [name.lower() for name in self.model_types]
            if model_type is None or model_type.lower() not in known:
                return False
        return any(_pattern(pattern).match(param_name) for pattern in self.patterns)

    def get_partition_dim(self) -> int:
        """The dimension that is cut."""
        if self.partition_dim is not None:
            return self.partition_dim
        return 0 if self.partition_type is PartitionType.COLUMN else 1

    def has_unequal_sub_params(self) -> bool:
        """Whether `shape` lists the size of every piece."""
        return self.get_sub_param_sizes() is not None

    def get_sub_param_sizes(self) -> tuple[int, ...] | None:
        """The listed sizes of the pieces, in elements."""
        pieces = self._pieces()
        return pieces if isinstance(pieces, tuple) else None

    def get_num_sub_params(self) -> int | None:
        """The number of pieces, listed or equal; None without `shape` or where it is inferred."""
        pieces = self._pieces()
        if isinstance(pieces, tuple):
            return len(pieces)
        return pieces if pieces is not None and pieces > 0 else None

    def _pieces(self) -> int | tuple[int, ...] | None:
        dim = self.get_partition_dim()
        if self.shape is None or dim >= len(self.shape):
            return None
        return self.shape[dim]


def preset_spec(label: str, pattern: str, row: Mapping[str, Any]) -> TPLayerSpec:
    """A row of a preset's table; a plan calls its rule `label`."""
    spec = TPLayerSpec(
        patterns=[pattern],
        partition_type=row["partition_type"],
        shape=row["shape"],
        partition_dim=row["partition_dim"],
        gather_output=row["gather_output"],
        grad_allreduce=row["sum_gradient"],
    )
    spec._source, spec._label = "preset", label
    return spec


def add_rule(rules: _core.Rules, spec: TPLayerSpec, *, label: str) -> None:
    """Append a specification; `label` names the rule if it is the user's own."""
    rules.add(
        spec.patterns,
        _core_spec(spec),
        label=spec._label or label,
        model_types=spec.model_types or (),
        source=spec._source,
    )


def _core_spec(spec: TPLayerSpec) -> dict[str, Any]:
    """The specification in the core's words."""
    words: dict[str, Any] = {
        "partition_type": spec.partition_type.value,
        "gather_output": spec.gather_output,
        "sum_gradient": spec.grad_allreduce,
    }
    if spec.shape is not None:
        words["shape"] = spec.shape
    if spec.partition_dim is not None:
        words["partition_dim"] = spec.partition_dim
    return words


@functools.lru_cache(maxsize=1024)
def _pattern(text: str) -> _core.Pattern:
    """Compiled once, however many parameters it is tried on."""
    return _core.Pattern(text)


def _patterns(value: object) -> list[str]:
    """At least one pattern, each of which Python's re compiles."""
    found = strings("patterns")(value)
    if not found:
        raise ValueError("got none, expected at least one pattern")
    lines = []
    for index, pattern in enumerate(found):
        try:
            _pattern(pattern)
        except ValueError as error:
            lines.append(f"patterns[{index}]: {error}")
    if lines:
        raise ConfigProblems("TPLayerSpec", lines)
    return found


def _partition_type(value: object) -> PartitionType:
    """The member, its name in any case, or the equal member of another library's enumeration."""
    name = value.value if isinstance(value, enum.Enum) else value
    for member in PartitionType:
        if isinstance(name, str) and name.lower() == member.value:
            return member
    raise wrong(value, "'column', 'row' or 'skip'")


def _shape(value: object) -> Shape | None:
    """Lists become tuples; one level of nesting, integers only."""
    if value is None:
        return None
    sizes: list[int | tuple[int, ...]] = []
    for item in sequence(value, "integers"):
        if isinstance(item, list | tuple):
            sizes.append(tuple(_size(piece, "the size of a piece") for piece in item))
        else:
            sizes.append(_size(item, "an integer or a list of sizes"))
    return tuple(sizes)


def _size(value: object, expected: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _LARGEST_SIZE:
        raise ValueError(f"got a list with {shown(value)}, expected {expected}")
    return value


def _dim(value: object) -> int | None:
    return None if value is None else integer(0)(value)


def _model_types(value: object) -> list[str] | None:
    return None if value is None else strings("model types")(value)


SPEC_CHECKS: Mapping[str, Check] = {
    "patterns": _patterns,
    "partition_type": _partition_type,
    "shape": _shape,
    "partition_dim": _dim,
    "model_types": _model_types,
    "gather_output": flag,
    "grad_allreduce": flag,
}
