# SPDX-License-Identifier: Apache-2.0
"""Activations by the published formula, of a model whose step cannot be traced."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from deepspeed_autotp import _core
from deepspeed_autotp.estimate.step_recorder import stacks_of
from deepspeed_autotp.estimate.trace import Shape
from deepspeed_autotp.interop.transformers import model_facts


@dataclass(frozen=True, slots=True)
class Formula:
    """Bytes on one TP rank."""

    saved: int
    logits: int
    source: str


def formula_activations(
    model: nn.Module, ranks: int, shape: Shape, itemsize: int, *, checkpointing: bool
) -> Formula:
    """Of a decoder with one kind of block; the logits are those of one rank, as its output and its
    gradient have them."""
    values = model_facts(model).integers
    keys = ("hidden_size", "d_model", "n_embd")
    hidden = next((values[key] for key in keys if key in values), 0)
    layers = sum(map(len, stacks_of(model).values()))
    tokens = shape.sequences * shape.tokens
    saved = _core.activation_formula(layers, tokens, hidden, ranks, itemsize, False, checkpointing)
    logits = tokens * values.get("vocab_size", 0) * itemsize // ranks
    return Formula(
        saved, logits, "Korthikanti et al. 2022, table 2, with attention that keeps no scores"
    )
