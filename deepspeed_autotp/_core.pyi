# SPDX-License-Identifier: Apache-2.0
"""The C core: everything that can be decided without a tensor.

TypeError and ValueError name the argument, what was given and what was expected. Ints are not
bools, sequences are not strings."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Self, final

__all__ = [
    "Entry",
    "Kind",
    "Layer",
    "LocalInteger",
    "Model",
    "Pattern",
    "Plan",
    "Records",
    "Row",
    "Rules",
    "Source",
    "Stack",
    "activation_formula",
    "check_spec",
    "collective_seconds",
    "core_info",
    "dtype_name",
    "family_blocks",
    "index_pattern",
    "merge",
    "nearest",
    "optimizer_states",
    "order_layouts",
    "plan_reads",
    "precision",
    "preset_names",
    "preset_rows",
    "reshard",
    "settle_tp_size",
    "split",
    "split_grain",
    "style_names",
    "style_spec",
    "timeline_peak",
]

def split(size: int, unit: int, ranks: int) -> tuple[int, ...]:
    """Widths per rank, each a multiple of `unit`; earlier ranks take the remainder."""

def split_grain(size: int, grain: int, ranks: int) -> tuple[int, ...]:
    """Widths per rank, in multiples of `grain` where that is possible."""

def index_pattern(name: str, /) -> str:
    """A dotted name with ``*`` for each index, as in ``layers.*.mlp``."""

def optimizer_states(name: str, /) -> int:
    """Float32 values that an optimizer keeps per weight, by its name in lower case."""

def collective_seconds(kind: str, size: int, ranks: int, bandwidth: float, /) -> float:
    """Seconds of a collective to which each rank gives `size` bytes, on a ring of `ranks`."""

def order_layouts(
    candidates: Sequence[tuple[int, int, int, int, float]], memory: int, /
) -> tuple[tuple[int, bool, str], ...]:
    """(index, fits, reason) of each (tp, replicas, stage, bytes, seconds), best first."""

def timeline_peak(
    parts: Sequence[tuple[tuple[int, int], Sequence[tuple[int, int]], int]], share: float, /
) -> tuple[int, int]:
    """(live, gradients) where live + share * gradients is largest.

    parts: (end, moments, repeats), in order, as pairs (live, gradients) above the start of a part.
    """

def activation_formula(
    layers: int,
    tokens: int,
    hidden: int,
    ranks: int,
    itemsize: int,
    sequence_parallel: bool,
    checkpointing: bool,
    /,
) -> int:
    """Bytes kept for the backward pass on one TP rank, by Korthikanti et al. 2022."""

def nearest(name: str, names: Sequence[str], limit: int = 3) -> tuple[str, ...]:
    """The names close to `name`, nearest first."""

def dtype_name(spelling: str, where: str) -> str:
    """torch's name of a data type without the prefix. ValueError starting with `where`."""

def precision(bf16: bool, fp16: bool) -> str | None: ...  # "bfloat16", "float16"; bf16 wins
def family_blocks() -> tuple[tuple[str, tuple[str, ...], bool, str | None], ...]:
    """(output, inputs, whether they are heads, model type or None), first match first."""

def preset_names() -> tuple[str, ...]: ...
def preset_rows(name: str, /) -> tuple[tuple[str, dict[str, Any]], ...]:
    """(pattern, spec) of a preset; spec as check_spec returns it."""

def style_names() -> tuple[str, ...]: ...  # of plans of transformers, old and new
def style_spec(style: str, pattern: str) -> dict[str, Any]:
    """The specification behind a style of a transformers plan. Errors name `pattern`."""

def check_spec(spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    """With each key, and shape as a tuple; an unknown key is an error that starts with `where`."""

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
    """{"autotp_size": int | None, "tp_size": int | None, "tp_group": bool, "make_groups": bool}."""

def settle_tp_size(sources: Sequence[tuple[str, int]], /) -> int | None:
    """The TP size that all sources (where, size) agree on; a size of -1 is not stated."""

def plan_reads(
    slices: Sequence[tuple[Any, ...]], gap: int = 0
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, int, int], ...], int]:
    """(reads, spans, bytes) of slices of tensors in files.

    slices: (file, begin, itemsize, shape, starts, lengths, out_begin, out_strides), out in elements
    reads: (slice, begin, rows, row bytes, stride, out_begin, out_stride), in the order of the files
    spans: (file, begin, end), which have more than `gap` bytes between them
    """

def reshard(sources: Sequence[Sequence[int]], target: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """(old rank, offset in its shard, offset in the new one, length); runs as ``Entry.runs``."""

@final
class Pattern:
    """A pattern with the results of ``re.match``. ValueError if ``re.compile`` refuses it."""

    def __new__(cls, pattern: str) -> Self: ...
    def match(self, subject: str, /) -> bool:
        """ValueError for a pattern that backtracks without end."""
    @property
    def pattern(self) -> str: ...
    @property
    def native(self) -> bool: ...  # whether PCRE2 decides; otherwise Python's re does

@final
class Records:
    """What tp_model_init recorded: (tp_size, dtype, group, group_size), one per model."""

    def __new__(cls) -> Self: ...
    def add(
        self, key: int, tp_size: int, dtype: str, group: int = 0, group_size: int = 0
    ) -> None: ...
    def find(self, key: int, /) -> tuple[int, str, int, int] | None: ...
    def latest(self) -> tuple[int, tuple[int, str, int, int]] | None: ...
    def remove(self, key: int, /) -> None: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...

@final
class Rules:
    """Ordered rules; earlier ones win."""

    def __new__(cls) -> Self: ...
    def add(
        self,
        patterns: Sequence[str],
        spec: Mapping[str, Any],
        *,
        label: str,
        model_types: Sequence[str] = (),
        source: str = "partition_config",
    ) -> None: ...
    def add_preset(self, name: str, /) -> None: ...
    def add_style(self, pattern: str, style: str, *, required: bool = False) -> None:
        """One entry of a transformers plan. `required`: no plan where it matches nothing."""
    def find(
        self,
        parameter: str,
        module: str | None = None,
        model_type: str | None = None,
        prefix: str = "",
    ) -> tuple[int, ...]:
        """Indices of the rules that match, in order."""
    @property
    def only_skip(self) -> bool: ...  # there are rules, and all of them skip
    def __len__(self) -> int: ...

@final
class Model:
    """Names, shapes and integers of a model.

    modules: (name, class name, kind, integers); kind is "linear", "conv1d", "embedding" or
    "other"; parents come before children and the first is ("", ...).
    parameters: (name, leaf, module index, shape, dtype, itemsize, index of the first name or -1).
    """

    def __new__(
        cls,
        modules: Sequence[tuple[str, str, str, Mapping[str, int]]],
        parameters: Sequence[tuple[str, str, int, Sequence[int], str, int, int]],
        *,
        model_type: str | None = None,
        prefix: str = "",
        integers: Mapping[str, int] = ...,
        input_embedding: int = -1,
        output_head: int = -1,
        takes_labels: bool = False,
    ) -> Self: ...

class Kind(StrEnum):
    """What happens to a parameter, or to the forward of a module."""

    REPLICATED = "replicated"
    REPLICATED_SUM = "replicated+sum"
    SKIPPED = "skip"
    COLUMN = "column"
    ROW = "row"
    VOCABULARY = "vocabulary"
    HIDDEN = "hidden"
    EXPERTS = "experts"
    WHOLE_EXPERTS = "whole experts"
    WHOLE_EXPERT_BLOCKS = "whole expert blocks"
    EXPERTS_COLUMN = "experts column"
    EXPERTS_ROW = "experts row"
    SHARE = "share"
    ROPE = "rope"
    NORM = "norm"
    HEADS = "heads"

class Source(StrEnum):
    """Who decided."""

    PARTITION_CONFIG = "partition_config"
    PRESET = "preset"
    TP_PLAN = "tp_plan"
    FAMILY = "family"
    HEURISTIC = "heuristic"
    DEFAULT = "default"
    NONE = "-"

@final
class Entry:
    """One parameter of a plan; read-only."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def source(self) -> Source: ...
    @property
    def rule(self) -> str: ...  # label of the deciding rule, or empty
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dim(self) -> int: ...  # the dimension that shrinks; -1: replicated
    @property
    def view(self) -> tuple[int, int, int]: ...  # (outer, size, inner); replicated: (1, n, 1)
    @property
    def is_sharded(self) -> bool: ...
    @property
    def is_tied(self) -> bool: ...
    @property
    def tied_to(self) -> int: ...  # index of the entry whose tensor this is, or -1
    def local_shape(self, rank: int, /) -> tuple[int, ...]: ...
    def width(self, rank: int, /) -> int:
        """Elements of the sharded dim that `rank` holds, out of `view[1]`; all if replicated."""
    def runs(self, rank: int, /) -> tuple[int, ...]: ...  # start, length, ...; replicated: empty
    def is_counted(self, rank: int, /) -> bool: ...  # in a sum over all ranks: it owns a run
    def chunks(self, rank: int, begin: int, end: int, /) -> tuple[tuple[int, int, int, bool], ...]:
        """(offset in the shard, offset in the full tensor, length, owned), all along `dim`."""
    def blocks(self, rank: int, block: int, /) -> tuple[int, int, tuple[int, ...]]:
        """(outer, size, runs along size) in blocks of `block` elements; an error if one splits."""
    def shared(self, rank: int, /) -> tuple[tuple[int, int, int, int], ...]:
        """Runs that other ranks hold too: (offset in the shard, length, owner, holders)."""

@final
class Layer:
    """One module whose forward changes; weight and bias are indices of entries, or -1.

    Of a norm, weight is that of the projection whose layout its features have.
    """

    @property
    def module(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def weight(self) -> int: ...
    @property
    def bias(self) -> int: ...
    @property
    def gather_output(self) -> bool: ...
    @property
    def split_input(self) -> bool: ...
    @property
    def opens_region(self) -> bool: ...  # each rank has its own features behind it
    @property
    def closes_region(self) -> bool: ...  # it is given these features
    @property
    def is_large(self) -> bool: ...  # nothing else shards it: sharded individually
    @property
    def divided(self) -> tuple[int, ...]:
        """Of experts: entries that are added to the sum, of which each rank adds its share."""
    @property
    def siblings(self) -> tuple[int, ...]:
        """Of a column layer: the layers, it among them, likely to be given the same input."""
    @property
    def features(self) -> tuple[int, tuple[int, ...], tuple[tuple[int, ...], ...]]: ...
    @property
    def has_full_output(self) -> bool: ...
    @property
    def gathers_weight(self) -> bool: ...  # for who reads its weight outside of its forward
    @property
    def is_heuristic(self) -> bool: ...  # names or sizes alone say so, in an untried type
    @property
    def block(self) -> tuple[str, ...]:
        """Names of the modules to plan anew where it is wrong, with ``*`` for each index."""

@final
class LocalInteger:
    """An integer attribute of a module that has another value on each rank."""

    @property
    def module(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def full(self) -> int: ...
    @property
    def values(self) -> tuple[int, ...]: ...

@final
class Stack:
    """Layers between which the tokens are sharded; names of modules."""

    @property
    def owner(self) -> str: ...
    @property
    def layers(self) -> tuple[str, ...]: ...
    @property
    def gather_input(self) -> tuple[str, ...]: ...  # these gather all tokens first
    @property
    def reduce_scatter_output(self) -> tuple[str, ...]: ...  # the sum for own tokens
    @property
    def norms(self) -> tuple[str, ...]: ...  # of the owner, behind the layers
    @property
    def gather_scatter(self) -> tuple[str, ...]: ...  # and shard them again behind
    @property
    def token_arguments(self) -> tuple[str, ...]: ...  # of a layer: they have each token, too
    @property
    def streams_first(self) -> bool: ...  # a layer is given [streams, batch, sequence, features]

@final
class Row:
    """Parameters that differ in indices only; local_bytes has one value per rank."""

    @property
    def pattern(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def entry(self) -> Entry:
        """The first of them; `index` is its place in Plan.entries."""
    @property
    def index(self) -> int: ...
    @property
    def full_bytes(self) -> int: ...
    @property
    def local_bytes(self) -> tuple[int, ...]: ...

@final
class Plan:
    """What happens to every parameter; decided once, never changed."""

    def __new__(
        cls,
        model: Model,
        rules: Rules,
        *,
        ranks: int,
        grain: int = 1,
        strict: bool = False,
        defaults: bool = True,
        embedding_dim: int = 1,
        head_patterns: Sequence[str] = ("lm_head", "embed_out"),
        replicated: Sequence[str] = (),
        individual: Sequence[str] = (),
        families: bool = True,
        heuristics: bool = True,
        large_layers: bool = True,
        large_names: Sequence[str] | None = None,
        sequence_parallel: bool = False,
        all_tokens: Sequence[str] = (),
        vocab_parallel_lm_head: bool | None = None,
        expert_partition: str = "width",
        must_shard: bool = False,
    ) -> Self:
        """replicated: names of modules that stay replicated with all below; ``*`` is one index.

        individual: those whose layers are sharded one by one, with full activations between them.
        families: where no rule speaks, blocks are sharded that names and sizes tell.
        heuristics: also in models of a type that was never tried.
        large_layers: large layers that nothing else shards are sharded individually.
        large_names: these are large, ``*`` for each index, and not those that hold much.
        sequence_parallel: each rank has a shard of the tokens; ValueError where that cannot be.
        all_tokens: blocks that scatter their outputs then, and whose row layers give full ones.
        vocab_parallel_lm_head: True: ValueError where no layer can keep its shard of the logits.
        expert_partition: "experts": each rank has some of the experts in the place of a shard of
            each; ValueError naming a module that cannot be sharded so. "auto": where it would hold
            thin shards; the rules of the parameters say why.
        must_shard: ValueError, saying which rules to write, where nothing is sharded.
        """

    @property
    def ranks(self) -> int: ...
    @property
    def hash(self) -> str: ...  # equal for equal plans of equal models
    @property
    def entries(self) -> tuple[Entry, ...]: ...
    @property
    def layers(self) -> tuple[Layer, ...]: ...
    @property
    def integers(self) -> tuple[LocalInteger, ...]: ...
    @property
    def stacks(self) -> tuple[Stack, ...]: ...
    @property
    def region_blocks(self) -> tuple[str, ...]: ...  # in whose forwards regions are
    @property
    def replicated_dropouts(self) -> tuple[str, ...]: ...  # within a region
    @property
    def sharded_dropouts(self) -> tuple[str, ...]: ...  # outside of one
    @property
    def logits_layer(self) -> Layer | None: ...  # keeps its shard of the logits with labels
    @property
    def samples(self) -> tuple[int, ...]: ...  # whose gradients are compared for all
    @property
    def layout_hash(self) -> str: ...  # of names, shapes and runs
    @property
    def skips_all(self) -> bool: ...  # rules skip parameters, and nothing else is asked for
    @property
    def messages(self) -> tuple[str, ...]: ...
    def table(self) -> tuple[Row, ...]: ...
    def form_difference(self, other: Plan, /) -> str | None:
        """What only one of the plans says of what is called alike, whatever its size, or None."""
    def rank_memory(
        self,
        rank: int,
        *,
        stage: int,
        replicas: int,
        states: int,
        trains: Sequence[bool] | None = None,
        reduce_bucket: int = 500_000_000,
        persistence: int = 100_000,
        max_live: int = 1_000_000_000,
        sub_group: int = 1_000_000_000,
        overlap_comm: bool = False,
    ) -> dict[str, Any]:
        """What a TP rank holds with DeepSpeed, in bytes, of its data-parallel ranks the one that
        holds most: parameters, gathered, gradients, master, states, buckets, kept_buckets, step;
        share, the part of its gradients that it keeps while they come to be; elements, trained;
        traffic, what it sends to replicas in a step, as (kind, bytes, purpose).

        trains: by entry, whether it is trained.
        """

    def replicated_warning(self) -> str | None: ...  # where a rank holds nearly everything
