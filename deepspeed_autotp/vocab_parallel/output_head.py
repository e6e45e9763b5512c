# SPDX-License-Identifier: Apache-2.0
"""The output head of a transformers model in training with labels: its logits stay sharded.

The head then gives this rank's columns of the logits, an ordinary tensor, which is not copied where
the model upcasts it, and the model's
``loss_function`` forms the loss from those of all ranks. In evaluation, without labels, under
torch.compile and where a user's hook is on the head, it gathers them. So does a model of
which it is not known that it computes the same on any columns (interop/loss_route.py).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed_autotp.interop.labels import labels_argument
from deepspeed_autotp.interop.loss_route import (
    LossRoute,
    has_user_hooks,
    loss_route,
    replace_loss,
)
from deepspeed_autotp.interop.module_state import set_state
from deepspeed_autotp.interop.torch_private import plain_results
from deepspeed_autotp.layers.layer_sharding import LayerSharding, all_gather_output, sharding_of
from deepspeed_autotp.vocab_parallel.cross_entropy import vocabulary_cross_entropy
from deepspeed_autotp.vocab_parallel.lazy_logits import LazyLogits

_log = logging.getLogger("deepspeed_autotp")


@dataclass(slots=True)
class _Step:
    """One forward with sharded logits: its soft cap, and what the loss was given."""

    soft_cap: float
    heads: int = 0
    shard: Tensor | None = None
    logits: LazyLogits | None = None


class OutputHead:
    """Stands before the forward of a model, as its ``forward`` and its ``loss_function``."""

    def __init__(self, route: LossRoute, head: nn.Module) -> None:
        labels = labels_argument(route.model)
        assert labels is not None
        self._labels, self._route, self._head = labels, route, head
        self._sharding = sharding_of(head)
        self._loss: Callable[..., Any] = route.model.loss_function
        self._step: _Step | None = None
        functools.update_wrapper(self, route.model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the model."""
        model = self._route.model
        forward = type(model).forward
        outer = self._step  # of a forward that calls the model itself
        if not self._keeps_sharded(args, kwargs):
            with self._without(outer):
                return forward(model, *args, **kwargs)
        with self._route.soft_cap_as(None) as cap:
            step = self._step = _Step(cap or (outer.soft_cap if outer else 0.0))
            try:
                outputs = forward(model, *args, **kwargs)
            finally:
                self._step = outer
        if step.heads and step.logits is None:
            raise RuntimeError(
                f"{type(model).__name__} was given labels and did not give its logits to "
                "self.loss_function; set tensor_parallel.vocab_parallel_lm_head to false"
            )
        return _replaced(outputs, step.shard, step.logits)

    @contextmanager
    def _without(self, outer: _Step | None) -> Iterator[None]:
        """Let the forward gather its logits, also within one that keeps them sharded."""
        if outer is None:
            yield
            return
        self._step = None
        try:
            with self._route.soft_cap_as(outer.soft_cap) if outer.soft_cap else nullcontext():
                yield
        finally:
            self._step = outer

    def gather(self, shard: Tensor, sharding: LayerSharding) -> Tensor:
        """The logits [..., V] of a shard [..., V/R], or the shard."""
        if self._step is None:
            return all_gather_output(shard, sharding)
        self._step.heads += 1
        if self._route.upcasts and shard.itemsize < torch.float32.itemsize:
            return shard.as_subclass(_UpcastShard)
        return shard

    def loss(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's ``loss_function``."""
        if self._step is None:
            return self._loss(*args, **kwargs)
        return self._sharded_loss(self._step, *args, **kwargs)

    def _keeps_sharded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        model = self._route.model
        # A compiled forward is traced with full logits.
        if torch.compiler.is_compiling() or not model.training:
            return False
        return (
            self._labels.is_given(args, kwargs)
            and model.loss_function == self.loss
            and not has_user_hooks(self._head)
        )

    def _sharded_loss(
        self,
        step: _Step,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **unused: object,
    ) -> Tensor:
        """As transformers' ForCausalLMLoss and ForMaskedLMLoss, which ignore other arguments."""
        layout, group = self._sharding.layout, self._sharding.group
        width = layout.widths[group.rank]
        if step.heads != 1 or logits.shape[-1] != width or vocab_size != layout.size:
            raise RuntimeError(
                f"{type(self._route.model).__name__}.loss_function: got logits with "
                f"{logits.shape[-1]} columns and vocab_size {vocab_size}, expected this rank's "
                f"{width} of {layout.size}; set tensor_parallel.vocab_parallel_lm_head to false"
            )
        if self._route.shifts and shift_labels is not None:
            labels = shift_labels
        elif self._route.shifts:
            labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        labels = labels.reshape(-1).to(logits.device)
        upcasts = self._route.cap_upcasts if step.soft_cap else self._route.upcasts
        dtype = torch.float32 if upcasts else logits.dtype
        kept = LazyLogits(logits, layout, group, dtype=dtype, soft_cap=step.soft_cap)
        step.shard, step.logits = logits, kept
        losses = vocabulary_cross_entropy(
            logits.reshape(labels.numel(), width),
            labels,
            layout=layout,
            group=group,
            ignore_index=ignore_index,
            overwrite=lambda: not self._route.ends_in_tanh and kept.overwrite(),
            soft_cap=step.soft_cap,
        )
        total = losses.sum().float()
        if num_items_in_batch is None:
            return total / (labels != ignore_index).sum()
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch


class _UpcastShard(Tensor):
    """A shard in 16 bits whose ``float()`` is no copy: the loss computes in float32 anyhow."""

    __torch_function__ = plain_results()

    def float(self, **_: Any) -> Tensor:
        return self.as_subclass(Tensor)


def _replaced(outputs: Any, shard: Tensor | None, logits: LazyLogits | None) -> Any:
    """``outputs``, a tuple or mapping, with ``logits`` in the place of the shard."""
    if isinstance(outputs, tuple):
        return tuple(logits if value is shard else value for value in outputs)
    for key, value in list(outputs.items()):
        if value is shard:
            outputs[key] = logits
    return outputs


def keep_logits_sharded(
    model: nn.Module, head: nn.Module, undo: list[Callable[[], None]], *, insist: bool = False
) -> None:
    """Let ``head``, a sharded layer, give its shard of the logits in training with labels; ``undo``
    receives what undoes each step.

    A model that may need full logits keeps them: ValueError if ``insist``.
    """
    route = loss_route(model, head)
    if route is None:
        name = type(model).__name__
        why = (
            f"{name}.forward is not known to do nothing with its logits but scale or cap them by "
            "numbers, give them to self.loss_function and return them"
        )
        if insist:
            raise ValueError(
                f"tensor_parallel.vocab_parallel_lm_head: got true, but {why}; leave the key out"
            )
        _log.info("the logits of %s are gathered in training: %s", name, why)
        return
    state = OutputHead(route, head)
    undo.append(set_state(head, replace(sharding_of(head), gather=state.gather)))
    undo.append(replace_loss(route.model, state.loss))
    attributes = vars(route.model)
    attributes["forward"] = state
    undo.append(lambda: attributes.pop("forward"))
