# SPDX-License-Identifier: Apache-2.0
"""Attention maps in the output of a transformers model: each rank has those of its own heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp.interop.transformers import text_config

_KEYS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
_HEADS, _DIMS = 1, 4


def _heads(config: Any, key: str) -> object:
    """The heads of the full model in its maps ``key``."""
    part = {"attentions": "num", "encoder_attentions": "encoder"}.get(key, "decoder")
    found = getattr(config, f"{part}_attention_heads", None)
    return getattr(config, "num_attention_heads", None) if found is None else found


def refuse_local_maps(model: nn.Module, _: object, output: Any) -> None:
    """A forward hook. ValueError for maps [B, N/R, Q, K] of some of the N heads."""
    if torch.compiler.is_compiling():
        return
    for key in _KEYS:
        heads = _heads(text_config(model), key)
        maps = getattr(output, key, None)
        for each in maps if isinstance(maps, tuple) else ():
            is_map = isinstance(each, Tensor) and each.dim() == _DIMS
            if is_map and type(heads) is int and each.shape[_HEADS] < heads:
                raise ValueError(
                    f"output_attentions: {key} have {each.shape[_HEADS]} heads on this rank, and "
                    f"the model has {heads}: a sharded model does not gather its attention maps; "
                    "leave attention replicated by rules with partition_type 'skip', or ask an "
                    "unsharded model for them"
                )
