# SPDX-License-Identifier: Apache-2.0
"""What an estimate without a trace reads of a model, as data alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from deepspeed_autotp.planning.model_data import ModelData

# What the blocks of a kind have in common, as ``block_kind`` says it.
KindText = Annotated[str, Field(pattern=r"^ \S+ ")]


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model with what its training changes.

    ``trains``  by parameter, whether it is trained
    ``stacks``  for each list of blocks, by name, the kinds of its blocks
    """

    data: ModelData
    trains: tuple[bool, ...]
    stacks: Mapping[str, tuple[KindText, ...]]

    def __post_init__(self) -> None:
        if len(self.trains) != len(self.data.parameters):
            raise ValueError("trains: expected a value for each parameter")

    @property
    def dtype(self) -> tuple[str, int]:
        """Name and itemsize of the data type of the weights."""
        for *_, name, itemsize, _ in self.data.parameters:
            return name, itemsize
        return "float32", 4


def class_of_kind(kind: KindText) -> str:
    """The class of the blocks of a kind, whose first line is " ClassName settings"."""
    return kind.split("\n", 1)[0].split(" ")[1]
