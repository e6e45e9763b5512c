# SPDX-License-Identifier: Apache-2.0
"""A named model with what a run does to it, made on the meta device as often as it is needed."""

from __future__ import annotations

import torch
from torch import nn

from deepspeed_autotp.config.dtypes import named_dtype
from deepspeed_autotp.estimate.changes import Changes
from deepspeed_autotp.estimate.model_record import ModelRecord
from deepspeed_autotp.estimate.step_recorder import block_kind, stacks_of
from deepspeed_autotp.interop.model_changes import enable_checkpointing, with_lora
from deepspeed_autotp.interop.named_model import is_factory, named_model
from deepspeed_autotp.interop.small_config import is_configured, small_model, with_layers
from deepspeed_autotp.planning.model_description import described


class LiveModel:
    """A model by the words that name it. ValueError for what names no model, or one that cannot be
    made."""

    def __init__(self, text: str, changes: Changes) -> None:
        self._text = text
        self._changes = changes
        self._asked = None if changes.dtype is None else named_dtype(changes.dtype)
        self._base = named_model(text, dtype=self._asked)
        self._dtype = next((p.dtype for p in self._base.parameters()), torch.float32)
        if changes.checkpointing:
            enable_checkpointing(self._base)

    @property
    def is_of_factory(self) -> bool:
        """Whether code of the user makes it: the text does not say what it is."""
        return is_factory(self._text)

    def record(self) -> ModelRecord:
        """All of the model as data."""
        full = self._base if self._changes.lora is None else self.build(None)
        data, parameters = described(full)
        return ModelRecord(
            data=data,
            trains=tuple(parameter.requires_grad for parameter in parameters),
            stacks={name: tuple(map(block_kind, s)) for name, s in stacks_of(full).items()},
        )

    def build(self, layers: int | None) -> nn.Module:
        """A new model on the meta device, with all blocks or the first of each stack.

        ValueError for a number of blocks of a model that is not made of a configuration.
        """
        base = self._base
        if is_configured(base):
            config = base.config if layers is None else with_layers(base, layers)
            made = small_model(base, config, device="meta").to(self._dtype)
        elif layers is None:
            made = named_model(self._text, dtype=self._asked)
        else:
            raise ValueError("the model is not made of a configuration")
        return made if self._changes.lora is None else with_lora(made, self._changes.lora)
