# SPDX-License-Identifier: Apache-2.0
"""The output head of a model that is given labels: its logits stay sharded.

In training with labels the head gives sharded logits; in evaluation, and without labels, it gathers
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp.interop.labels import LabelsArgument, labels_argument
from deepspeed_autotp.layers.layer_sharding import LayerSharding, all_gather_output
from deepspeed_autotp.vocab_parallel.logits import logits_from_shard


class OutputHead:
    """Whether the output head keeps its logits sharded in the forward that runs."""

    def __init__(self, labels: LabelsArgument) -> None:
        self._labels = labels
        self._keeps_sharded = False

    def gather(self, shard: Tensor, sharding: LayerSharding) -> Tensor:
        """The logits [..., V] of a shard [..., V/R]."""
        if self._keeps_sharded and not torch.compiler.is_compiling():
            return logits_from_shard(shard, sharding.layout, sharding.group)
        return all_gather_output(shard, sharding)

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A compiled forward is traced with plain tensors.
        is_compiled = torch.compiler.is_compiling()
        is_given = self._labels.is_given(args, kwargs)
        self._keeps_sharded = model.training and not is_compiled and is_given

    def leave(self, model: nn.Module, args: object, output: object) -> None:
        self._keeps_sharded = False


def keep_logits_sharded(model: nn.Module, head: nn.Module) -> Callable[[], None]:
    """Let ``head``, a sharded layer, give sharded logits in training with labels; returns the
    undo."""
    labels = labels_argument(model)
    assert labels is not None
    state = OutputHead(labels)
    before: LayerSharding = vars(head)["sharding"]
    vars(head)["sharding"] = dataclasses.replace(before, gather=state.gather)
    hooks = (
        model.register_forward_pre_hook(state.enter, with_kwargs=True),
        model.register_forward_hook(state.leave, always_call=True),
    )

    def back() -> None:
        vars(head)["sharding"] = before
        for hook in hooks:
            hook.remove()

    return back
