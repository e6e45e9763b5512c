# SPDX-License-Identifier: Apache-2.0
"""The output head of a transformers model in training with labels: its logits stay sharded.

What the head then gives to the model is a ``LazyLogits``, and the model's ``loss_function`` forms
the loss from the shards of all ranks, which for many tokens are never formed for all of these. A
model that uses the logits otherwise gathers them by that.
They are gathered at once in evaluation, without labels, under torch.compile, where a user's hook is
on the head, and in a model that does not use a ``loss_function`` of transformers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed_autotp.distributed.lazy_sequence import LazySequence, own_tokens
from deepspeed_autotp.interop.labels import labels_argument
from deepspeed_autotp.interop.loss_function import replace_loss, shifts_labels
from deepspeed_autotp.interop.module_state import set_state, state_of
from deepspeed_autotp.interop.peft import without_adapters
from deepspeed_autotp.interop.torch_private import (
    has_user_hooks,
    in_autograd_function,
    saves_tensors_by,
    with_leaves,
)
from deepspeed_autotp.layers.class_swap import mix_in
from deepspeed_autotp.layers.forward_context import HeadOfOwnTokens
from deepspeed_autotp.layers.layer_sharding import LayerSharding, all_gather_output, sharding_of
from deepspeed_autotp.layers.linear import ColumnLinear
from deepspeed_autotp.vocab_parallel.gathered_weight import ReadsFullWeight
from deepspeed_autotp.vocab_parallel.head_product import (
    HeadProduct,
    deferred_product,
    may_defer_product,
)
from deepspeed_autotp.vocab_parallel.lazy_logits import LazyLogits, Step


class OutputHead:
    """Stands before the forward of a model, as its ``forward`` and its ``loss_function``."""

    def __init__(
        self,
        model: Any,
        head: nn.Module,
        *,
        behind: Sequence[nn.Module],
        shifts: bool,
        insist: bool,
    ) -> None:
        labels = labels_argument(model)
        assert labels is not None
        self._model, self._head, self._labels = model, head, labels
        self._behind, self._context = behind, sharding_of(head).context
        self._shifts, self._insist = shifts, insist
        self._loss: Callable[..., Any] = model.loss_function
        self._step: Step | None = None
        self._is_called = False  # the head, as a module: its hooks see what it gives
        functools.update_wrapper(self, model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the model."""
        forward, outer = type(self._model).forward, self._step
        is_kept = self._keeps_sharded(args, kwargs)
        step = Step(in_function=in_autograd_function()) if is_kept else None
        if step is outer is None:
            return forward(self._model, *args, **kwargs)
        # The last hook: those of ZeRO 3 have to see a tensor.
        hooks = [
            self._head.register_forward_pre_hook(self._begin),
            self._head.register_forward_hook(self._lazy),
        ]
        before, context = self._context.head, self._context
        takes_own = step is not None and self._takes_own_tokens()
        context.head = HeadOfOwnTokens(saves_tensors_by()) if takes_own else None
        self._step = step
        try:
            outputs = forward(self._model, *args, **kwargs)
            if takes_own:
                outputs = _with_all_tokens(outputs)
        finally:
            self._step, self._is_called = outer, False  # of a forward that calls the model itself
            context.head = before
            for hook in hooks:
                hook.remove()
            if step is not None:
                step.is_running = False
        if step is None:
            return outputs
        if self._insist and not step.has_loss:
            raise RuntimeError(
                f"{type(self._model).__name__}.forward needs all its logits before the loss, or "
                "gives them to no self.loss_function; leave tensor_parallel.vocab_parallel_lm_head "
                "out"
            )
        return _returned(outputs)

    def gather(self, shard: Tensor, sharding: LayerSharding) -> Tensor:
        """The logits [..., V] of a shard [..., V/R], or the shard."""
        is_kept = self._step is not None and self._is_called
        return shard if is_kept else all_gather_output(shard, sharding)

    def deferred(self, head: nn.Module, x: Tensor) -> HeadProduct | None:
        """The product of the head with ``x``, formed for the loss alone or when logits are read;
        None where it is formed now."""
        if self._step is None or not self._is_called:
            return None
        return deferred_product(head, self._model, x)

    def loss(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's ``loss_function``."""
        found = self._sharded_loss(*args, **kwargs)
        return self._loss(*args, **kwargs) if found is None else found

    def _keeps_sharded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        # A compiled forward is traced with full logits.
        if torch.compiler.is_compiling() or not self._model.training:
            return False
        return (
            self._labels.is_given(args, kwargs)
            and self._model.loss_function == self.loss
            and not torch.is_inference_mode_enabled()
            and not has_user_hooks(self._head)
        )

    def _takes_own_tokens(self) -> bool:
        """Whether the product of the head is formed from this rank's tokens of the hidden states.
        A user's hook, maybe on one rank only, is given full ones."""
        return (
            bool(self._behind)
            and may_defer_product(self._head)
            and not any(has_user_hooks(each, inputs=True) for each in self._behind)
        )

    def _begin(self, head: nn.Module, args: object) -> None:
        # A re-entrant checkpoint of the head alone hands its result on as a tensor.
        step = self._step
        self._is_called = step is not None and step.in_function == in_autograd_function()

    def _lazy(self, head: nn.Module, args: object, shard: Any) -> LazyLogits | None:
        if self._step is None or not self._is_called:
            return None
        self._is_called, sharding = False, sharding_of(head)
        return LazyLogits(shard, sharding.layout, sharding.group, step=self._step)

    def _sharded_loss(
        self,
        logits: object,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **unused: object,
    ) -> Tensor | None:
        """As transformers' ForCausalLMLoss and ForMaskedLMLoss, which ignore other arguments; None
        where it takes full logits."""
        if not isinstance(logits, LazyLogits):
            return None
        if self._shifts and shift_labels is not None:
            labels = shift_labels
        elif self._shifts:
            labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        labels = labels.reshape(-1).to(logits.device)
        count: Tensor | float
        if num_items_in_batch is None:
            count = (labels != ignore_index).sum()
        elif isinstance(num_items_in_batch, Tensor):
            count = num_items_in_batch.to(labels.device)
        else:
            count = num_items_in_batch
        return logits.loss(labels, ignore_index, count, columns=vocab_size)


class DefersProduct(nn.Module):
    """The output head, a column layer, mixed into its class."""

    def forward(self, x: Tensor) -> Tensor | HeadProduct:
        product = state_of(self, OutputHead).deferred(self, x)
        if product is not None:
            return product
        lazy = own_tokens(x)
        if lazy is not None:
            gathered = lazy.gathered()
            sharding_of(self).context.input.set_gathered(gathered)
            x = gathered.full
        y: Tensor = super().forward(x)
        return y


def _is_plain(head: nn.Module) -> bool:
    """Whether ``head`` gives its product and nothing else: no class before that of a column layer
    and no wrapper has a forward of its own."""
    if not isinstance(head, ColumnLinear) or "forward" in vars(head):
        return False
    before = itertools.takewhile(lambda cls: cls is not ColumnLinear, type(head).__mro__)
    return all(cls is ReadsFullWeight or "forward" not in vars(cls) for cls in before)


def _returned(outputs: Any) -> Any:
    """``outputs`` with full logits where the loss was formed of these."""
    if not isinstance(outputs, dict):
        return with_leaves(LazyLogits, LazyLogits.result, outputs)
    for key, value in list(outputs.items()):
        if isinstance(value, LazyLogits):
            outputs[key] = value.result()
    return outputs


def _with_all_tokens(outputs: Any) -> Any:
    """``outputs`` with plain tensors, on which ranks may act one by one."""
    if not isinstance(outputs, dict):
        return with_leaves(LazySequence, LazySequence.tensor, outputs)
    for key, value in list(outputs.items()):
        outputs[key] = with_leaves(LazySequence, LazySequence.tensor, value)
    return outputs


def keep_logits_sharded(
    model: nn.Module,
    head: nn.Module,
    undo: list[Callable[[], None]],
    *,
    behind: Sequence[nn.Module] = (),
    insist: bool = False,
) -> str:
    """Let ``head``, a sharded layer, give its shard of the logits in training with labels; ``undo``
    receives what undoes each step. Returns why it cannot, for a model with another loss, or "".

    ``behind``: modules between the layers and the head, where tokens are sharded between layers.
    ``insist``: a step whose loss takes full logits is an error.
    """
    inner: Any = without_adapters(model)
    shifts = shifts_labels(inner)
    if shifts is None:
        name = type(model).__name__
        return f"{name}.forward is not known to give its logits to a loss_function of transformers"
    is_plain = _is_plain(head)
    behind = behind if is_plain else ()
    state = OutputHead(inner, head, behind=behind, shifts=shifts, insist=insist)
    undo.append(set_state(head, replace(sharding_of(head), gather=state.gather)))
    if is_plain:
        undo.append(set_state(head, state))
        undo.append(mix_in(DefersProduct, head))
    undo.append(replace_loss(inner, state.loss))
    attributes = vars(inner)
    attributes["forward"] = state

    def back() -> None:
        # What others put around it since stays, and runs the forward of the class by ``state``.
        if attributes.get("forward") is state:
            del attributes["forward"]

    undo.append(back)
    return ""
