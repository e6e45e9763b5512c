# SPDX-License-Identifier: Apache-2.0
"""Every causal language model of transformers, small enough to train in a moment.

A configuration is shrunk by the names of its attributes: widths, heads, experts and ranks take
the value of ``SIZES``, lists with one element per layer keep the fewest layers that show every
value, token numbers fall inside the vocabulary, random noise is turned off. What these rules do
not get right stands in ``EXCEPTIONS``, one row per model type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.sizes import (
    EXCEPTIONS,
    FIRST_TOKEN,
    IMPLIED,
    INPUTS,
    LAST_TOKEN,
    LAYER_COUNTS,
    LAYERS,
    OPTIONAL,
    PARTS,
    SENSE_PARTS,
    SENSES,
    SIZES,
    STREAMS,
    UNTRAINABLE,
    VOCABULARY,
)

MODEL_TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def config(model_type: str) -> PretrainedConfig:
    """The shrunken configuration of a model type."""
    changes = EXCEPTIONS.get(model_type, {})
    full = AutoConfig.for_model(model_type)
    return AutoConfig.for_model(model_type, **_shrunk(full, changes, SIZES))


def build(model_type: str, *, seed: int = 0) -> nn.Module:
    """A model in float32 and training mode, with the weights that ``seed`` gives."""
    if model_type in UNTRAINABLE:
        raise ValueError(UNTRAINABLE[model_type])
    shrunk = config(model_type)
    torch.manual_seed(seed)
    if model_type in PARTS:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(shrunk)]
        model: nn.Module = model_class(vars(shrunk)[PARTS[model_type]])
    else:
        model = AutoModelForCausalLM.from_config(shrunk, dtype=torch.float32)
    return model.train()


def batch(model_type: str, step: int, *, rows: int = 4, length: int = 12) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward, the same on every rank: ``[rows, length]``
    tokens, which are the labels too, and what else the model takes."""
    draw = torch.Generator().manual_seed(100 + step)
    streams = STREAMS.get(model_type, 1)
    ids = torch.randint(FIRST_TOKEN, LAST_TOKEN, (rows * streams, length), generator=draw)
    labels = ids.view(rows, streams, length).transpose(1, 2) if streams > 1 else ids
    more = {
        name: torch.randn((rows, *shape), generator=draw)
        for name, shape in INPUTS.get(model_type, {}).items()
    }
    return {"input_ids": ids, "labels": labels, **more}


def _shrunk(
    full: PretrainedConfig, changes: Mapping[str, object], sizes: Mapping[str, object]
) -> dict[str, Any]:
    """Keyword arguments of the configuration's class. ``changes`` win; a dotted key belongs to a
    part of the configuration."""
    values = {key: value for key, value in vars(full).items() if not key.startswith("_")}
    own = {key: value for key, value in changes.items() if "." not in key}
    for marker, implied in IMPLIED.items():
        if marker in values:
            own = {**implied, **own}
    kept, count = _layers(values, sizes)
    shrunk: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, PretrainedConfig):
            prefix = f"{key}."
            inner = {k.removeprefix(prefix): v for k, v in changes.items() if k.startswith(prefix)}
            shrunk[key] = _shrunk(value, inner, SENSES if key in SENSE_PARTS else sizes)
        elif key in LAYER_COUNTS:
            shrunk[key] = len(kept)
        elif isinstance(value, list | tuple) and len(value) == count:
            if key in sizes:
                shrunk[key] = [sizes[key]] * len(kept)
            elif len(set(map(str, value))) < count:
                shrunk[key] = type(value)(value[index] for index in kept)
        else:
            _shrink_value(shrunk, key, value, sizes)
    return shrunk | own


def _layers(values: Mapping[str, Any], sizes: Mapping[str, object]) -> tuple[Sequence[int], int]:
    """The layers to keep and the number there were: every value of every list shows."""
    counts = [value for key, value in values.items() if key in LAYER_COUNTS]
    if not counts:
        return range(LAYERS), -1
    count = counts[0]
    lists = [
        value
        for key, value in values.items()
        if isinstance(value, list | tuple)
        and len(value) == count
        and key not in sizes
        and len(set(map(str, value))) < count
    ]
    kept = [
        index for index in range(count) if any(each[index] not in each[:index] for each in lists)
    ]
    more = [index for index in range(count) if index not in kept]
    return sorted(kept + more[: max(0, LAYERS - len(kept))]), count


def _shrink_value(
    shrunk: dict[str, Any], key: str, value: object, sizes: Mapping[str, object]
) -> None:
    if key in sizes:
        if value is not None or key not in OPTIONAL:
            shrunk[key] = sizes[key]
    elif isinstance(value, float) and _is_noise(key):
        shrunk[key] = 0.0
    elif isinstance(value, int) and key.endswith(("layers", "layer")) and value > LAYERS:
        shrunk[key] = LAYERS
    elif isinstance(value, int) and key.endswith(("_id", "_index")) and value >= VOCABULARY:
        shrunk[key] = LAST_TOKEN + value % (VOCABULARY - LAST_TOKEN)


def _is_noise(key: str) -> bool:
    """Whether an attribute is the probability or size of something random."""
    return any(word in key for word in ("drop", "jitter", "mask_time_prob", "mask_feature_prob"))


def example_inputs(model_type: str) -> dict[str, Tensor] | None:
    """Inputs that the self-check cannot infer; None where tokens are all."""
    if model_type not in INPUTS and model_type not in STREAMS:
        return None
    return {key: value for key, value in batch(model_type, 0).items() if key != "labels"}
