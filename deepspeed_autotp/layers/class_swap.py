# SPDX-License-Identifier: Apache-2.0
"""The class that a module takes when it is sharded.

A module is converted in place by another class, so that its hooks, its wrappers and the identity of
its parameters survive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deepspeed_autotp._core import Kind
from deepspeed_autotp.interop.bitsandbytes import is_linear_4bit
from deepspeed_autotp.interop.module_state import set_state, state_of
from deepspeed_autotp.interop.torch_private import own_parameters
from deepspeed_autotp.interop.transformers import is_plain_linear
from deepspeed_autotp.layers.attention import PerHeadBias, ReplicatedRope
from deepspeed_autotp.layers.drawn_weights import DrawnInFull, ResetInFull
from deepspeed_autotp.layers.embedding import HeadEmbedding, HiddenEmbedding, VocabularyEmbedding
from deepspeed_autotp.layers.experts import (
    Experts,
    ExpertsColumn,
    ExpertsRow,
    ReplicatedInExperts,
    WholeExpertBlocks,
    WholeExperts,
)
from deepspeed_autotp.layers.linear import ColumnConv1D, ColumnLinear, RowConv1D, RowLinear
from deepspeed_autotp.layers.linear_4bit import ColumnLinear4bit, RowLinear4bit
from deepspeed_autotp.layers.norm import GatheredNorm
from deepspeed_autotp.layers.summed_gradients import SumsGradients, summed_parameter

_CLASSES: dict[tuple[Kind, type[nn.Module]], type[nn.Module]] = {
    (Kind.COLUMN, nn.Linear): ColumnLinear,
    (Kind.ROW, nn.Linear): RowLinear,
    (Kind.COLUMN, nn.Embedding): HeadEmbedding,
    (Kind.VOCABULARY, nn.Embedding): VocabularyEmbedding,
    (Kind.HIDDEN, nn.Embedding): HiddenEmbedding,
}
_4BIT: dict[Kind, type[nn.Module]] = {Kind.COLUMN: ColumnLinear4bit, Kind.ROW: RowLinear4bit}
_CONV1D: dict[Kind, type[nn.Module]] = {Kind.COLUMN: ColumnConv1D, Kind.ROW: RowConv1D}

# By kind, what goes around the own forward of a module.
WRAPPERS: dict[Kind, type[nn.Module]] = {
    Kind.EXPERTS: Experts,
    Kind.WHOLE_EXPERTS: WholeExperts,
    Kind.WHOLE_EXPERT_BLOCKS: WholeExpertBlocks,
    Kind.EXPERTS_COLUMN: ExpertsColumn,
    Kind.EXPERTS_ROW: ExpertsRow,
    Kind.SHARE: ReplicatedInExperts,
    Kind.ROPE: ReplicatedRope,
    Kind.NORM: GatheredNorm,
    Kind.HEADS: PerHeadBias,
}


def sharded_class(module: nn.Module, kind: Kind) -> type[nn.Module]:
    """The class of a linear, embedding or Conv1D that is sharded as ``kind``.

    A subclass of ``nn.Linear`` or ``nn.Embedding`` keeps its own forward: its
    ``super().forward`` becomes the sharded forward, and not calling it is a RuntimeError.
    ValueError for an embedding whose options need all of its rows or a full row.
    """
    base = nn.Embedding if isinstance(module, nn.Embedding) else nn.Linear
    if not isinstance(module, base):
        return _CONV1D[kind]
    if isinstance(module, nn.Embedding):
        _refuse_options(module)
    sharded: Any = _CLASSES[kind, base]  # Any: mypy finds no hash in a class of modules
    own: Any = type(module)
    if is_linear_4bit(module):
        sharded = _4BIT[kind]
        return _combined(sharded, own, (sharded, own))
    if own is base:
        return _CLASSES[kind, base]
    if own.forward is base.forward:
        return _combined(sharded, own, (own, sharded))
    if is_plain_linear(module):
        return _combined(sharded, own, (sharded, own))
    return _combined(sharded, own, (_RequireSuperForward, own, _RecordForward, sharded))


def wrapper_class(
    module: nn.Module, kind: Kind, *, divided: Sequence[str] = (), ranks: int = 1
) -> type[nn.Module]:
    """The class of ``module`` with the wrapper of ``kind`` around its own forward.

    Parameters named in ``divided`` read as divided by ``ranks``.
    """
    wrapper: Any = WRAPPERS[kind]  # Any: mypy finds no hash in a class of modules
    own: Any = type(module)
    return _wrapped(wrapper, own, tuple(divided), ranks)


def set_class(module: nn.Module, cls: type[nn.Module]) -> Callable[[], None]:
    """Give ``module`` another class; returns the undo."""
    before = type(module)
    module.__class__ = cls
    # Kept from the start: torch.compile guards the number of objects that a module has.
    forget = set_state(module, _SuperForward()) if issubclass(cls, _RequireSuperForward) else None

    def back() -> None:
        module.__class__ = before
        if forget is not None:
            forget()

    return back


def mix_in(mixin: Any, module: nn.Module) -> Callable[[], None]:
    """Give ``module`` its class with ``mixin`` before it; returns the undo."""
    own: Any = type(module)
    return set_class(module, _combined(mixin, own, (mixin, own)))


def mix_in_sums(module: nn.Module, names: Sequence[str]) -> Callable[[], None]:
    """As :func:`mix_in` of ``SumsGradients``, with the parameters ``names``; returns the undo."""
    own: Any = type(module)
    return set_class(module, _summing(own, tuple(names)))


def changed_classes(model: nn.Module) -> list[str]:
    """The modules that took another class after they were sharded, by their names: a class of
    other code around the sharded one."""
    return [
        name
        for name, module in model.named_modules()
        if not _is_own(type(module)) and any(map(_is_own, type(module).__mro__))
    ]


def _is_own(cls: type[Any]) -> bool:
    return cls.__module__.startswith("deepspeed_autotp.")


# Both cached: one class for all layers alike, so that what is compiled for one serves the others.


@functools.cache
def _combined(sharded: type[Any], own: type[Any], bases: tuple[type[Any], ...]) -> type[nn.Module]:
    # Named here: a metaclass, as PEFT's have, would give its own module.
    return type(f"{sharded.__name__}Of{own.__name__}", bases, {"__module__": __name__})


@functools.cache
def _wrapped(
    wrapper: type[Any], own: type[Any], divided: tuple[str, ...], ranks: int
) -> type[nn.Module]:
    attributes: dict[str, Any] = {name: property(_divided(name, ranks)) for name in divided}
    attributes["__module__"] = __name__
    resets = issubclass(wrapper, DrawnInFull) and any(
        "reset_parameters" in vars(cls) for cls in own.__mro__
    )
    bases = (wrapper, ResetInFull, own) if resets else (wrapper, own)
    return type(f"{wrapper.__name__}Of{own.__name__}", bases, attributes)


@functools.cache
def _summing(own: type[Any], names: tuple[str, ...]) -> type[nn.Module]:
    attributes: dict[str, Any] = {
        name: summed_parameter(name, [vars(c)[name] for c in own.__mro__ if name in vars(c)])
        for name in names
    }
    attributes["__module__"] = __name__
    return type(f"{SumsGradients.__name__}Of{own.__name__}", (SumsGradients, own), attributes)


def _divided(name: str, ranks: int) -> Callable[[nn.Module], Tensor | None]:
    def read(module: nn.Module) -> Tensor | None:
        parameter = own_parameters(module)[name]
        return None if parameter is None else parameter / ranks

    return read


@dataclass(slots=True)
class _SuperForward:
    """Whether the forward that runs has called the sharded one."""

    reached: bool = False


class _RequireSuperForward(nn.Module):
    """Before a class with its own forward, which has to call the sharded one.

    A forward that uses the weight itself would silently compute with a shard of it.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        record = state_of(self, _SuperForward)
        record.reached = False
        y = super().forward(*args, **kwargs)
        if not record.reached:
            classes = type(self).__mro__
            own = classes[classes.index(_RequireSuperForward) + 1].__name__
            raise RuntimeError(
                f"{own}.forward does not call super().forward, and so skips the collectives that "
                "its sharded weight needs; let it call super().forward, or leave the layer "
                "replicated with partition_type 'skip'"
            )
        return y


class _RecordForward(nn.Module):
    """Between that class and the sharded one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state_of(self, _SuperForward).reached = True
        return super().forward(*args, **kwargs)


def _refuse_options(module: nn.Embedding) -> None:
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise ValueError(
            f"{module!r} cannot be sharded: max_norm, scale_grad_by_freq and sparse need the full "
            "embedding; switch them off, or leave it replicated with partition_type 'skip'"
        )
