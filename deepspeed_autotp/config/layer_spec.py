# SPDX-License-Identifier: Apache-2.0
"""One layer specification: which parameters are sharded, and how.

The class carries DeepSpeed's name, fields and defaults. The core checks a specification and
matches its patterns; here it is only written down.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictStr,
    TypeAdapter,
)
from pydantic.dataclasses import dataclass

from deepspeed_autotp import _core
from deepspeed_autotp.config.section import readable
from deepspeed_autotp.config.validation import ConfigProblems, NonNegative, list_of, wrong

__all__ = ["PartitionType", "TPLayerSpec", "add_rule", "preset_spec"]

# Sizes are C integers of 64 bits.
_LARGEST_SIZE = 2**63 - 1

_Size = Annotated[int, Field(strict=True, ge=-_LARGEST_SIZE, le=_LARGEST_SIZE)]
_SIZE, _SIZES = TypeAdapter(_Size), TypeAdapter(tuple[_Size, ...])


def _size_or_sizes(value: object) -> int | tuple[int, ...]:
    # A union of the two would tell both errors of every wrong value.
    if isinstance(value, list | tuple):
        return _SIZES.validate_python(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong(value, "an integer or a list of sizes")
    return _SIZE.validate_python(value)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


_Shape = Annotated[
    tuple[Annotated[int | tuple[int, ...], PlainValidator(_size_or_sizes)], ...],
    Field(strict=True),
    BeforeValidator(_as_tuple),
]


class PartitionType(enum.Enum):
    """Which features of a layer are sharded."""

    COLUMN = "column"  # output features; the gradient of the input is summed
    ROW = "row"  # input features; the output is summed
    SKIP = "skip"  # none: the layer is replicated


def _partition_type(value: object) -> PartitionType:
    """A member by its name in any case, also one of another library's enumeration."""
    name = value.value if isinstance(value, enum.Enum) else value
    try:
        return PartitionType(name.lower() if isinstance(name, str) else name)
    except ValueError:
        raise wrong(value, "'column', 'row' or 'skip'") from None


@functools.lru_cache(maxsize=1024)
def _pattern(text: str) -> _core.Pattern:
    """Compiled once, however many parameters it is tried on."""
    return _core.Pattern(text)


def _compiles(patterns: list[str]) -> list[str]:
    if not patterns:
        raise wrong(patterns, "at least one pattern")
    lines = []
    for index, pattern in enumerate(patterns):
        try:
            _pattern(pattern)
        except ValueError as error:
            lines.append(f"[{index}]: {error}")
    if lines:
        raise ConfigProblems("patterns", lines)
    return patterns


@readable
@dataclass(config=ConfigDict(extra="forbid"))
class TPLayerSpec:
    """How the parameters that match one of `patterns` are sharded.

    patterns        regular expressions with the results of `re.match` on the parameter's name, or
                    on that of its module
    partition_type  `"column"` shards output features, `"row"` input features, `"skip"` leaves the
                    weight replicated
    shape           the pieces of a fused weight: `[2, -1]` is two equal ones along dim 0,
                    `[[q, k, v], -1]` three of these sizes, in elements; -1 is inferred
    partition_dim   the dimension that is sharded, of the weight as `shape` shows it; by default 0
                    for column and 1 for row
    model_types     the rule holds for these model types only, in any case
    gather_output   column: every rank receives the full output
    grad_allreduce  skip: the gradient is partial on each rank, and is all-reduced

    Raises ValueError that lists every field with a wrong value.
    """

    patterns: Annotated[list[StrictStr], list_of("patterns"), AfterValidator(_compiles)]
    partition_type: Annotated[PartitionType, PlainValidator(_partition_type)] = PartitionType.COLUMN
    shape: _Shape | None = None
    partition_dim: NonNegative | None = None
    model_types: Annotated[list[StrictStr], list_of("model types")] | None = None
    gather_output: StrictBool = False
    grad_allreduce: StrictBool = False

    # Who wrote the specification and what a plan calls it; "" is the place in `layer_specs`.
    _source: str = field(default="partition_config", init=False, repr=False, compare=False)
    _label: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _core.check_spec(_core_spec(self), "")

    def matches(self, param_name: str, model_type: str | None = None) -> bool:
        """Whether a pattern matches at the start of the name, and the model type fits."""
        if self.model_types:
            known = [name.lower() for name in self.model_types]
            if model_type is None or model_type.lower() not in known:
                return False
        return any(_pattern(pattern).match(param_name) for pattern in self.patterns)

    def get_partition_dim(self) -> int:
        """The dimension that is sharded."""
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
