# SPDX-License-Identifier: Apache-2.0
"""A model as data alone, without torch: all that a plan is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from deepspeed_autotp._core import Model

# (name, class, kind, integers), and
# (name, leaf, index of the module, full shape, dtype, itemsize, index of what it is tied to or -1).
ModuleRow = tuple[str, str, str, dict[str, int]]
ParameterRow = tuple[str, str, int, tuple[int, ...], str, int, int]
# The tp_plan of the model: (pattern, style, whether it is the user's and has to match something).
Style = tuple[str, str, bool]


@dataclass(frozen=True, slots=True)
class ModelData:
    """Names, shapes and integers of a model, and its own ``tp_plan``.

    ``input_embedding`` and ``output_head`` are indices of modules, or -1.
    """

    modules: tuple[ModuleRow, ...]
    parameters: tuple[ParameterRow, ...]
    styles: tuple[Style, ...]
    model_type: str | None
    prefix: str
    integers: Mapping[str, int]
    input_embedding: int
    output_head: int
    takes_labels: bool

    def model(self) -> Model:
        """The core's view of it. ValueError for rows that are no model."""
        return Model(
            self.modules,
            self.parameters,
            model_type=self.model_type,
            prefix=self.prefix,
            integers=self.integers,
            input_embedding=self.input_embedding,
            output_head=self.output_head,
            takes_labels=self.takes_labels,
        )


class Plannable(Protocol):
    """What a plan can be made of: a described model, or one of which there is the data alone."""

    @property
    def model(self) -> Model: ...

    @property
    def styles(self) -> tuple[Style, ...]: ...
