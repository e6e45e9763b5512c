# SPDX-License-Identifier: Apache-2.0
"""LoRA merged into the weights of a sharded model, and out of them again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deepspeed_autotp.interop.bitsandbytes import is_4bit
from deepspeed_autotp.interop.deepspeed.parameters import is_partitioned
from deepspeed_autotp.interop.fully_shard import fully_sharded_modules
from deepspeed_autotp.interop.module_state import set_state, state_of
from deepspeed_autotp.interop.peft import lora_layers
from deepspeed_autotp.interop.torch_private import own_parameters
from deepspeed_autotp.layers.class_swap import mix_in
from deepspeed_autotp.state.sharded_model import TensorParallel, owner_of, shard_of
from deepspeed_autotp.vocab_parallel.gathered_weight import reading_shard


@dataclass(frozen=True, slots=True)
class _Owner:
    """The sharded model that a LoRA layer is in."""

    state: weakref.ref[TensorParallel]


def merge_into_shards(state: TensorParallel, root: nn.Module) -> list[Callable[[], None]]:
    """Let the LoRA layers of ``root`` merge into shards; what undoes it, step by step."""
    undo: list[Callable[[], None]] = []
    for layer, base, factors in lora_layers(root):
        weight = own_parameters(base).get("weight")
        undo.append(set_state(layer, _Owner(weakref.ref(state))))
        undo.append(mix_in(_Merges, layer))
        # Where all factors of a sharded layer are replicated, as on an embedding.
        if (
            weight is not None
            and state.is_sharded(weight)
            and not any(map(state.is_sharded, factors))
        ):
            undo.append(mix_in(_MergesReplicated, layer))
    return undo


class _Merges(nn.Module):
    """A LoRA layer of a sharded model: merges into shards, and refuses ``adapter_names``."""

    base_layer: nn.Module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: got several adapters for one batch, which PEFT runs in another "
                "order on each rank; expected one adapter for all rows: choose it by set_adapter"
            )
        return super().forward(x, *args, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        inner: Any = super()
        with _changing_weight(self, self.base_layer):
            inner.merge(*args, **kwargs)

    def unmerge(self) -> None:
        inner: Any = super()
        with _changing_weight(self, self.base_layer):
            inner.unmerge()


@contextmanager
def _changing_weight(layer: nn.Module, base: nn.Module) -> Iterator[None]:
    """Within it PEFT adds to the weight of ``base``. ValueError where that would be lost."""
    own = [p for p in own_parameters(base).values() if p is not None]
    # A copy has a state of its own; fully_shard puts other tensors in the place of parameters.
    found = (owner_of(parameter) for parameter in own)
    state = next((each for each in found if each is not None), state_of(layer, _Owner).state())
    if state is not None and state.is_gathered:
        raise ValueError(
            "adapters cannot be merged or unmerged within gather_params, which discards what is "
            "added to weights; leave it first"
        )
    if any(map(is_partitioned, own)):
        raise ValueError(
            "ZeRO 3 has partitioned the weights, and adapters cannot be merged or unmerged: save "
            "the adapter and merge it into an unsharded model"
        )
    if state is not None and state.root is not None and fully_sharded_modules(state.root):
        raise ValueError(
            "fully_shard has partitioned the weights, and adapters cannot be merged or unmerged: "
            "save the adapter and merge it into an unsharded model"
        )
    if any(map(is_4bit, own)):
        raise ValueError(
            "the weights are in 4 bits, and adapters cannot be merged or unmerged: save the "
            "adapter, and merge it into an unsharded model in bfloat16 or the like"
        )
    # PEFT unmerges within the forward of a model whose adapters were merged, and then disabled.
    with ExitStack() as stack:
        for module in layer.modules():
            stack.enter_context(reading_shard(module))
        yield


class _MergesReplicated(nn.Module):
    """LoRA on a sharded layer, whose factors are replicated."""

    base_layer: nn.Module

    def get_delta_weight(self, adapter: str) -> Tensor:
        inner: Any = super()
        full: Tensor = inner.get_delta_weight(adapter)
        weight = own_parameters(self.base_layer)["weight"]
        state = None if weight is None else owner_of(weight)
        entry = None if weight is None or state is None else state.entry(weight)
        if state is None or entry is None:
            return full
        return shard_of(full, entry=entry, rank=state.group.rank)
