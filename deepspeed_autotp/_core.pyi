"""The C core: everything that can be decided without a tensor."""

from collections.abc import Mapping, Sequence
from typing import Any, final

__all__ = [
    "Entry", "Layer", "LocalInteger", "Model", "Pattern", "Plan", "Records", "Row", "Rules",
    "core_info", "dtype_name", "nearest", "merge", "precision", "preset_names", "preset_rows", "split",
    "split_grain", "check_spec", "style_spec",
]

def split(size: int, unit: int, ranks: int) -> tuple[int, ...]: ...
def split_grain(size: int, grain: int, ranks: int) -> tuple[int, ...]: ...
def nearest(name: str, names: Sequence[str], limit: int = 3) -> tuple[str, ...]: ...
def dtype_name(spelling: str, where: str) -> str: ...
def precision(bf16: bool, fp16: bool) -> str | None: ...
def preset_names() -> tuple[str, ...]: ...
def preset_rows(name: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """(pattern, spec) of a preset; spec as check_spec returns it."""
def style_spec(style: str, pattern: str) -> dict[str, Any]: ...
def check_spec(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check {partition_type, partition_dim, shape, gather_output, split_input, sum_gradient}.

    Missing keys take their default, unknown keys are an error. Returns the normalised dict.
    """
def core_info() -> dict[str, Any]:
    """{"pcre2": "10.42 ...", "jit": bool}"""
def merge(
    record: tuple[int, str, int, int] | None,
    *,
    autotp_size: int = -1,
    tp_size: int = -1,
    tp_group: int = 0,
    tp_group_size: int = 0,
    section: str = "tp",
    dtype: str | None = None,
    bf16: bool = False,
    fp16: bool = False,
    has_mpu: bool = False,
    has_mesh: bool = False,
) -> dict[str, Any]:
    """{"autotp_size": int | None, "tp_size": int | None, "tp_group": bool, "make_groups": bool}.

    record is (tp_size, dtype, group, group_size), as Records returns it.
    """

@final
class Pattern:
    """A pattern with the results of ``re.match``. ValueError if ``re.compile`` refuses it."""

    def __init__(self, pattern: str) -> None: ...
    def match(self, subject: str) -> bool: ...
    @property
    def pattern(self) -> str: ...
    @property
    def native(self) -> bool: ...

@final
class Records:
    def add(self, key: int, tp_size: int, dtype: str, group: int = 0, group_size: int = 0) -> None: ...
    def find(self, key: int) -> tuple[int, str, int, int] | None: ...
    def latest(self) -> tuple[int, tuple[int, str, int, int]] | None: ...
    def remove(self, key: int) -> None: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...

@final
class Rules:
    """Ordered rules; earlier ones win."""

    def add(
        self,
        patterns: Sequence[str],
        spec: Mapping[str, Any],
        *,
        label: str,
        model_types: Sequence[str] = (),
        source: str = "partition_config",
    ) -> None: ...
    def add_preset(self, name: str) -> None: ...
    def add_style(self, pattern: str, style: str) -> None: ...
    def find(self, parameter: str, module: str | None = None, model_type: str | None = None, prefix: str = "") -> tuple[int, ...]:
        """Indices of the rules that match, in order."""
    def __len__(self) -> int: ...

@final
class Model:
    """Names, shapes and integers of a model.

    modules: (name, class name, kind, integers); kind is "linear", "conv1d", "embedding" or
    "other"; parents come before children and the first is ("", ...).
    parameters: (name, leaf, module index, shape, dtype, itemsize, index of the first name or -1).
    """

    def __init__(
        self,
        modules: Sequence[tuple[str, str, str, Mapping[str, int]]],
        parameters: Sequence[tuple[str, str, int, Sequence[int], str, int, int]],
        *,
        model_type: str | None = None,
        prefix: str = "",
        integers: Mapping[str, int] = ...,
        input_embedding: int = -1,
        output_head: int = -1,
    ) -> None: ...

@final
class Entry:
    """One parameter of a plan. Struct sequence, read-only."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def rule(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dim(self) -> int: ...
    @property
    def view(self) -> tuple[int, int, int]:
        """(outer, size, inner) of the full weight around the cut."""
    @property
    def tied_to(self) -> int: ...
    def local_shape(self, rank: int) -> tuple[int, ...]: ...
    def runs(self, rank: int) -> tuple[int, ...]:
        """start, length, start, length, ...; empty when the parameter is whole."""
    def shared(self, rank: int) -> tuple[tuple[int, int, int, int], ...]:
        """Runs that other ranks hold too: (offset in the shard, length, owner, holders)."""

@final
class Layer:
    @property
    def module(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def weight(self) -> int: ...
    @property
    def bias(self) -> int: ...
    @property
    def gather_output(self) -> bool: ...
    @property
    def split_input(self) -> bool: ...

@final
class LocalInteger:
    @property
    def module(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def full(self) -> int: ...
    @property
    def values(self) -> tuple[int, ...]: ...

@final
class Row:
    @property
    def pattern(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def entry(self) -> Entry: ...
    @property
    def full_bytes(self) -> int: ...
    @property
    def local_bytes(self) -> tuple[int, ...]: ...

@final
class Plan:
    def __init__(
        self,
        model: Model,
        rules: Rules,
        *,
        ranks: int,
        grain: int = 1,
        strict: bool = False,
        defaults: bool = True,
        embedding_dim: int = 1,
        head_patterns: Sequence[str] = ("lm_head", "embed_out"),
    ) -> None: ...
    @property
    def ranks(self) -> int: ...
    @property
    def hash(self) -> str:
        """16 hexadecimal digits."""
    @property
    def entries(self) -> tuple[Entry, ...]: ...
    @property
    def layers(self) -> tuple[Layer, ...]: ...
    @property
    def integers(self) -> tuple[LocalInteger, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def table(self) -> tuple[Row, ...]: ...
