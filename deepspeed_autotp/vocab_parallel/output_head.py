# SPDX-License-Identifier: Apache-2.0
"""The output head of a model that is given labels: it keeps its part of the logits.

In training with labels the head gives logits that are cut over the ranks; in evaluation, and
without labels, it gathers them as before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp import interop
from deepspeed_autotp.layers.linear import Sharding, gathered
from deepspeed_autotp.vocab_parallel.logits import spread


class Head:
    """What the output head does with its part of the logits in the forward that runs."""

    def __init__(self, labels: interop.LabelsArgument) -> None:
        self._labels = labels
        self._keeps = False

    def give(self, part: Tensor, sharding: Sharding) -> Tensor:
        """The logits [..., V] of a part [..., V/R]."""
        if self._keeps and not torch.compiler.is_compiling():
            return spread(part, sharding.parts, sharding.group)
        return gathered(part, sharding)

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A compiled forward is traced with plain tensors.
        compiled = torch.compiler.is_compiling()
        self._keeps = model.training and not compiled and self._labels.is_given(args, kwargs)

    def leave(self, model: nn.Module, args: object, output: object) -> None:
        self._keeps = False


def keep_parts(model: nn.Module, head: nn.Module) -> Callable[[], None]:
    """Let ``head``, sharded already, keep its part in training with labels; returns the undo."""
    labels = interop.labels_argument(model)
    assert labels is not None
    state = Head(labels)
    before: Sharding = vars(head)["sharding"]
    vars(head)["sharding"] = dataclasses.replace(before, give=state.give)
    hooks = (
        model.register_forward_pre_hook(state.enter, with_kwargs=True),
        model.register_forward_hook(state.leave, always_call=True),
    )

    def back() -> None:
        vars(head)["sharding"] = before
        for hook in hooks:
            hook.remove()

    return back
