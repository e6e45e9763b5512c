# SPDX-License-Identifier: Apache-2.0
"""Inputs of a language model that no library knows, from its forward and its embedding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from deepspeed_autotp.interop.labels import forward_parameters

# Rows and tokens of what is inferred.
_SHAPE = (2, 8)
# What an optional argument is called where it changes training: the ids to predict.
_LABELS = ("label", "target")
_SHORT_LABELS = ("y", "tgt")
_SEED = 21


def inferred_inputs(model: nn.Module, *, device: torch.device) -> dict[str, object] | None:
    """Token ids for each argument that the forward needs, and for its labels; None where that
    cannot be: without an embedding to take the vocabulary from, without such an argument, or where
    one is annotated as something other than a tensor.

    Ids are below the size of the first embedding, [2, 8] int64, and the same on every rank.
    """
    vocabulary = next((m.num_embeddings for m in model.modules() if type(m) is nn.Embedding), 0)
    names = _arguments_of_ids(model)
    if not names or vocabulary < 1:
        return None
    draw = torch.Generator().manual_seed(_SEED)
    return {name: torch.randint(vocabulary, _SHAPE, generator=draw).to(device) for name in names}


@dataclass(frozen=True, slots=True)
class TrainingData:
    """A data set with indices, and how its samples become a batch; None: as torch does."""

    samples: Any
    collate: Callable[[list[Any]], Any] | None

    def inputs(self, model: nn.Module, *, device: torch.device) -> dict[str, object] | None:
        """The first batch as keyword arguments of ``model``: a mapping by its keys, a sequence or
        a tensor in the order of the forward's arguments. None for another kind of data set, and
        for a batch that is neither or has more than these."""
        rows = _SHAPE[0]
        count = len(self.samples) if isinstance(self.samples, Sized) else 0
        if count < rows:
            return None
        first = [self.samples[index] for index in range(rows)]
        batch = (self.collate or default_collate)(first)
        values = _by_keyword(batch, [parameter.name for parameter in _positional(model)])
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()} or None


def _by_keyword(batch: object, names: Sequence[str]) -> Mapping[str, object]:
    if isinstance(batch, Mapping):
        return {str(key): value for key, value in batch.items()}
    values = [batch] if isinstance(batch, Tensor) else batch
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) > len(names):
        return {}
    return dict(zip(names, values, strict=False))


def _arguments_of_ids(model: nn.Module) -> list[str]:
    """The arguments that are given ids; empty where one that is needed is something else."""
    names = []
    for parameter in _positional(model):
        needed = parameter.default is inspect.Parameter.empty
        if needed and not _may_be_tensor(parameter.annotation):
            return []
        if needed or _says_labels(parameter.name):
            names.append(parameter.name)
    return names


def _positional(model: nn.Module) -> list[inspect.Parameter]:
    """The named arguments of the forward."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each for each in forward_parameters(model).values() if each.kind not in several]


def _may_be_tensor(annotation: Any) -> bool:
    """Whether an annotation, maybe in quotes, is missing or names a tensor."""
    if annotation is inspect.Parameter.empty:
        return True
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return "Tensor" in text or text in ("Any", "typing.Any", "object")


def _says_labels(name: str) -> bool:
    return name in _SHORT_LABELS or any(word in name for word in _LABELS)
