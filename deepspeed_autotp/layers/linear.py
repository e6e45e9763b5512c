# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight is sharded.

A module is converted in place by giving it one of these classes, so that its hooks, its
wrappers and the identity of its parameters survive. T is the number of tokens, I and O are
input and output features, R the ranks, V the vocabulary, H the hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed_autotp import interop
from deepspeed_autotp.distributed.mappings import (
    Parts,
    gather_parts,
    sum_over_ranks,
    take_own,
)
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.layers.embedding_lookup import lookup
from deepspeed_autotp.layers.grad_overlap import SharedInput


def gathered(part: Tensor, sharding: Sharding) -> Tensor:
    """The whole output of a layer, from this rank's part."""
    return gather_parts(part, sharding.parts, sharding.group)


@dataclass(frozen=True, slots=True)
class Sharding:
    """What a converted layer knows: its group, and the parts of the dimension that is cut.

    ``siblings`` are the parameters of the layers, this one among them, that are likely to share
    its input: not the modules, which would make a cycle that only the garbage collector frees;
    ``give`` makes the output of a column layer with ``gather_output`` out of this rank's part, and
    ``total`` that of a row layer out of this rank's summand.
    """

    group: TPGroup
    input: SharedInput
    parts: Parts
    siblings: tuple[Mapping[str, Tensor | None], ...] = ()
    gather_output: bool = False
    split_input: bool = False
    give: Callable[[Tensor, Sharding], Tensor] = gathered
    total: Callable[[Tensor, TPGroup], Tensor] = sum_over_ranks

    def enter(self, x: Tensor, *, training: bool) -> None:
        """At the input of a column layer: what follows is this rank's own."""
        if training and not self.gather_output and self.parts.uneven:
            self.group.fork.enter(x.device)

    def leave(self, x: Tensor) -> None:
        """At the input of a row layer: what follows is common to the ranks.

        Before the product, since a recomputation may end in it.
        """
        self.group.fork.leave(x.device)
        self.input.forget()


class ColumnLinear(nn.Linear):
    """Linear whose output features are sharded.

    x  [T, I]     replicated
    w  [O/R, I]   this rank's rows
    y  [T, O/R]   = x @ w.T + b, or [T, O] with ``gather_output``

    forward   no communication (all-gather with ``gather_output``)
    backward  all-reduce of dx
    """

    sharding: Sharding

    def forward(self, x: Tensor) -> Tensor:
        own = self.sharding
        own.enter(x, training=self.training)
        return self.finish(own.input.linear(x, self.weight, self.bias, siblings=own.siblings))

    def finish(self, y: Tensor) -> Tensor:
        """Give the whole output where the plan says so."""
        own = self.sharding
        return own.give(y, own) if own.gather_output else y


class RowLinear(nn.Linear):
    """Linear whose input features are sharded.

    x  [T, I/R]   this rank's part, or [T, I] with ``split_input``
    w  [O, I/R]   this rank's columns
    y  [T, O]     = sum over ranks of x @ w.T, then + b once

    forward   all-reduce of the output
    backward  no communication (all-gather of dx with ``split_input``)
    """

    sharding: Sharding

    def forward(self, x: Tensor) -> Tensor:
        own = self.sharding
        own.leave(x)
        if own.split_input:
            x = take_own(x, own.parts, own.group)
        y = own.total(F.linear(x, self.weight), own.group)
        # Under autocast the bias is wider than the product, and would widen the output.
        return y if self.bias is None else y + self.bias.to(y.dtype)


class VocabularyEmbedding(nn.Embedding):
    """Embedding whose vocabulary is sharded.

    ids [T]        replicated
    w   [V/R, H]   this rank's rows
    y   [T, H]     = sum over ranks of w[ids] where the rank holds the id, else 0

    forward   all-reduce of the output
    backward  no communication

    An id outside the vocabulary is an IndexError on a host, and a row of NaN on a GPU.
    """

    sharding: Sharding

    def forward(self, ids: Tensor) -> Tensor:
        own = self.sharding
        start, rows = own.parts.runs[own.group.rank]
        if self.weight.shape[0] != rows:
            raise ValueError(
                f"an embedding of {own.parts.size} rows has {self.weight.shape[0]} on rank "
                f"{own.group.rank} of {own.group.size}, expected {rows}: it was resized after the "
                "model was sharded; resize it before"
            )
        found = lookup(self.weight, ids, start=start, size=own.parts.size, padding=self.padding_idx)
        return sum_over_ranks(found, own.group)


class HiddenEmbedding(nn.Embedding):
    """Embedding whose hidden dimension is sharded.

    ids [T]        replicated
    w   [V, H/R]   this rank's columns
    y   [T, H]     = the ranks' w[ids] side by side

    forward   all-gather of the output
    backward  no communication
    """

    sharding: Sharding

    def forward(self, ids: Tensor) -> Tensor:
        own = self.sharding
        return gather_parts(F.embedding(ids, self.weight, self.padding_idx), own.parts, own.group)


class HeadTable(nn.Embedding):
    """Embedding with a column for each head of attention whose heads are sharded.

    ids [T]        replicated
    w   [V, N/R]   the columns of this rank's heads
    y   [T, N/R]   = w[ids]

    forward   no communication
    backward  no communication
    """

    sharding: Sharding

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight, self.padding_idx)


class ColumnConv1D(nn.Module):
    """GPT-2's transposed linear, ``w [I, O/R]``; otherwise as :class:`ColumnLinear`."""

    sharding: Sharding
    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        own = self.sharding
        own.enter(x, training=self.training)
        y = own.input.linear(x, self.weight, self.bias, siblings=own.siblings, transposed=True)
        return own.give(y, own) if own.gather_output else y


class RowConv1D(nn.Module):
    """GPT-2's transposed linear, ``w [I/R, O]``; otherwise as :class:`RowLinear`."""

    sharding: Sharding
    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        own = self.sharding
        own.leave(x)
        if own.split_input:
            x = take_own(x, own.parts, own.group)
        y = own.total(F.linear(x, self.weight.t()), own.group)
        return y + self.bias.to(y.dtype)


_CLASSES: dict[tuple[str, type[nn.Module]], type[nn.Module]] = {
    ("column", nn.Linear): ColumnLinear,
    ("row", nn.Linear): RowLinear,
    ("column", nn.Embedding): HeadTable,
    ("vocabulary", nn.Embedding): VocabularyEmbedding,
    ("hidden", nn.Embedding): HiddenEmbedding,
}
_CONV1D: dict[str, type[nn.Module]] = {"column": ColumnConv1D, "row": RowConv1D}


class _MustReach(nn.Module):
    """Stands before a class with its own forward, which must come to the sharded one.

    A forward that takes the weight itself would compute with a part of it, in silence.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        vars(self)["reached"] = False
        y = super().forward(*args, **kwargs)
        if not vars(self)["reached"]:
            own = type(self).__mro__[2].__name__
            raise RuntimeError(
                f"{own}.forward does not call super().forward, and so misses what makes up for its "
                "weight being sharded; let it call super().forward, or leave the layer whole with "
                "partition_type 'skip'"
            )
        return y


class _Reached(nn.Module):
    """Stands between the two."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        vars(self)["reached"] = True
        return super().forward(*args, **kwargs)


def sharded_class(module: nn.Module, kind: str) -> type[nn.Module]:
    """The class that ``module`` takes when it is cut as ``kind``.

    A subclass of ``nn.Linear`` or ``nn.Embedding`` keeps its own forward: what that calls as
    ``super().forward`` becomes the sharded forward, and RuntimeError says so if it calls nothing.
    ValueError for an embedding whose options need all of its rows or the whole of one.
    """
    base = nn.Embedding if isinstance(module, nn.Embedding) else nn.Linear
    if not isinstance(module, base):
        return _CONV1D[kind]
    if isinstance(module, nn.Embedding):
        _refuse_options(module)
    sharded: Any = _CLASSES[kind, base]  # Any: mypy finds no hash in a class of modules
    own: Any = type(module)
    if own is base:
        return _CLASSES[kind, base]
    if own.forward is base.forward:
        return _combined(sharded, own, (own, sharded))
    if interop.is_plain_linear(module):
        return _combined(sharded, own, (sharded, own))
    return _combined(sharded, own, (_MustReach, own, _Reached, sharded))


@functools.cache
def _combined(sharded: type[Any], own: type[Any], bases: tuple[type[Any], ...]) -> type[nn.Module]:
    """One class for all layers alike, so that what is compiled for one serves the others."""
    return type(f"{sharded.__name__}Of{own.__name__}", bases, {})


def mixed_class(mixed: Any, module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` with ``mixed`` before it: one for all modules alike."""
    own: Any = type(module)
    return _combined(mixed, own, (mixed, own))


def _refuse_options(module: nn.Embedding) -> None:
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise ValueError(
            f"{module!r} cannot be cut: max_norm, scale_grad_by_freq and sparse hold for a whole "
            "embedding; leave it whole with partition_type 'skip', or switch them off"
        )
