# SPDX-License-Identifier: Apache-2.0
"""Activations by the published formula, of a model whose step cannot be traced."""

from __future__ import annotations

from dataclasses import dataclass

from deepspeed_autotp import _core
from deepspeed_autotp.estimate.model_record import ModelRecord
from deepspeed_autotp.estimate.trace_result import Shape


@dataclass(frozen=True, slots=True)
class Formula:
    """Bytes on one TP rank."""

    saved: int
    logits: int
    source: str


def formula_activations(
    record: ModelRecord, ranks: int, shape: Shape, *, checkpointing: bool
) -> Formula:
    """Of a decoder with one kind of block; the logits are those of one rank, as its output and its
    gradient have them."""
    values = record.data.integers
    keys = ("hidden_size", "d_model", "n_embd")
    hidden = next((values[key] for key in keys if key in values), 0)
    layers = sum(map(len, record.stacks.values()))
    tokens = shape.sequences * shape.tokens
    _, itemsize = record.dtype
    saved = _core.activation_formula(layers, tokens, hidden, ranks, itemsize, False, checkpointing)
    logits = tokens * values.get("vocab_size", 0) * itemsize // ranks
    return Formula(
        saved, logits, "Korthikanti et al. 2022, table 2, with attention that keeps no scores"
    )
