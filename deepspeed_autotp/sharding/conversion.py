# SPDX-License-Identifier: Apache-2.0
"""The step from an unsharded model to a sharded one, and back.

Everything but the sharding of tensors is recorded and can be undone: module classes, what is kept
on modules, integers, hooks, the forward and loss function of the model, and the data of parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp._core import Entry, Kind, Layer, Plan
from deepspeed_autotp.distributed.autograd_collectives import ShardLayout
from deepspeed_autotp.distributed.dropout_rng import DropoutRNG
from deepspeed_autotp.distributed.gradient_sum import GradientSum
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.bitsandbytes import is_4bit, is_linear_4bit
from deepspeed_autotp.interop.dropout import declares_dropout
from deepspeed_autotp.interop.module_state import set_state
from deepspeed_autotp.interop.torch_private import own_parameters
from deepspeed_autotp.layers.attention import takes_per_head_bias
from deepspeed_autotp.layers.class_swap import (
    WRAPPERS,
    mix_in,
    mix_in_sums,
    set_class,
    sharded_class,
    wrapper_class,
)
from deepspeed_autotp.layers.dropout import RegionBlock, ReplicatedDropout, ShardedDropout
from deepspeed_autotp.layers.forward_context import ForwardContext
from deepspeed_autotp.layers.grad_overlap import SharedInput
from deepspeed_autotp.layers.layer_sharding import LayerSharding
from deepspeed_autotp.layers.summed_gradients import SummedParameters
from deepspeed_autotp.native import packing
from deepspeed_autotp.planning.model_description import Description
from deepspeed_autotp.sequence_parallel.stack_modules import modules_behind_layers, shard_sequence
from deepspeed_autotp.sharding.local_config import with_local_integer
from deepspeed_autotp.sharding.partition import check_memory, move_parameters, shard_parameters
from deepspeed_autotp.sharding.pinned_copy import PinnedCopy
from deepspeed_autotp.sharding.quantized import shard_quantized
from deepspeed_autotp.state.grad_sync import open_subgroups, register_grad_hooks, sums_at_use
from deepspeed_autotp.state.sharded_model import shard_of
from deepspeed_autotp.vocab_parallel.gathered_weight import read_full_weight
from deepspeed_autotp.vocab_parallel.output_head import keep_logits_sharded


class Conversion:
    """One model, one plan, one group. All ranks of the group make it."""

    def __init__(
        self, description: Description, *, plan: Plan, group: TPGroup, overlap: bool
    ) -> None:
        self._modules = description.modules
        self._parameters = description.parameters
        self._plan = plan
        self._entries = {
            id(p): entry
            for p, entry in zip(reversed(self._parameters), reversed(plan.entries), strict=True)
        }
        self._group = group
        rng = DropoutRNG(
            group.rank,
            declared=declares_dropout(description.modules[""]),
            uneven=any(
                ShardLayout(*layer.features).is_uneven
                for layer in plan.layers
                if layer.opens_region
            ),
        )
        self._context = ForwardContext(SharedInput(group, overlap=overlap), rng=rng)
        self._undo: list[Callable[[], None]] = []
        self._unswitched = 0  # steps to undo that came before ``switch``
        open_subgroups(plan, group)
        self._copy: PinnedCopy | None = None

    def switch(self) -> None:
        """Give modules their sharded classes, local integers and gradient hooks."""
        self._unswitched = len(self._undo)
        layers = self._plan.layers
        for layer in layers:
            siblings = [own_parameters(self._modules[layers[i].module]) for i in layer.siblings]
            self._switch_layer(layer, siblings)
        for integer in self._plan.integers:
            module = self._modules[integer.module]
            value = integer.values[self._group.rank]
            owner, _, key = integer.key.rpartition(".")
            if owner:  # "config.<key>", as describe names what the module's configuration says
                value = with_local_integer(vars(module)[owner], key, value)
            self._assign(module, owner or key, value)
        shard_sequence(
            self._plan, self._modules, group=self._group, context=self._context, undo=self._undo
        )
        self._open_regions()
        self._sum_gradients()
        self._undo += [h.remove for h in self._context.register_hooks(self._modules[""])]
        for hook in register_grad_hooks(self._plan, self._parameters, self._group):
            self._undo.append(hook.remove)

    def _open_regions(self) -> None:
        """Give modules around sharded regions, and dropouts, the classes that know of these."""
        plan = self._plan
        for names, mixin in (
            # The model itself has hooks: its class is what a checkpoint names.
            ([name for name in plan.region_blocks if name], RegionBlock),
            (plan.replicated_dropouts, ReplicatedDropout),
            (plan.sharded_dropouts, ShardedDropout),
        ):
            for name in names:
                self._undo.append(set_state(self._modules[name], self._context))
                self._undo.append(mix_in(mixin, self._modules[name]))

    def _sum_gradients(self) -> None:
        """Let modules sum the gradients of parameters that other ranks use, too."""
        sums: dict[nn.Module, dict[str, GradientSum]] = {}
        for index, how in sums_at_use(self._plan, self._group).items():
            owner, _, name = self._plan.entries[index].name.rpartition(".")
            if self._parameters[index].is_floating_point():  # not one in 4 bits
                sums.setdefault(self._modules[owner], {})[name] = how
        for module, by_name in sums.items():
            self._undo.append(set_state(module, SummedParameters(by_name, self._context)))
            self._undo.append(mix_in_sums(module, list(by_name)))

    def keep_logits(self, *, insist: bool = False) -> str:
        """Let the output head keep its shard of the logits where labels are given, if the plan says
        so. Returns why it cannot where the plan says so, or "". Follows ``switch``; ``undo`` undoes
        it. ``insist``: a step whose loss takes full logits is an error."""
        head = self._plan.logits_layer
        if head is None:
            return ""
        model, module = self._modules[""], self._modules[head.module]
        behind = modules_behind_layers(self._plan, self._modules)
        return keep_logits_sharded(model, module, self._undo, behind=behind, insist=insist)

    def swap_in_views(self) -> None:
        """Let every sharded parameter be a view of its shard in the full weight.

        A shard of several runs cannot be a view and is a copy.
        """
        for index, entry in self._sharded_entries():
            parameter = self._parameters[index]
            rank = self._group.rank
            if is_4bit(parameter):
                self._undo.append(shard_quantized(parameter, entry, rank=rank))
                continue
            view = packing.narrow(
                parameter.data,
                view=entry.view,
                runs=entry.runs(rank),
                shape=entry.local_shape(rank),
            )
            self._swap_data(
                parameter,
                shard_of(parameter.data, entry=entry, rank=rank) if view is None else view,
            )

    def check_memory(self, device: torch.device | None) -> None:
        """Allocate what ``commit`` needs; ValueError where this rank's shards do not fit there."""
        if device is None or device == self._parameters[0].device:
            return
        self._check_memory(device)
        if self._parameters[0].device.type == "cpu":
            self._copy = PinnedCopy(device)

    def _check_memory(self, device: torch.device) -> None:
        buffers = list(self._modules[""].buffers())
        sizes = [row.local_bytes[self._group.rank] for row in self._plan.table()]
        sizes += [buffer.nbytes for buffer in buffers]
        check_memory(sum(sizes), len(self._parameters) + len(buffers), device)

    def commit(self, device: torch.device | None = None) -> None:
        """Shard the tensors; a storage is freed as soon as its shard is made.

        With a ``device`` other than theirs, the shards and all else of the model go there;
        ``check_memory`` has to come before.
        """
        rank = self._group.rank
        if device is None or device == self._parameters[0].device:
            entries = ((self._parameters[index], entry) for index, entry in self._sharded_entries())
            shard_parameters(entries, rank=rank)
        else:
            if self._copy is not None:
                pairs = zip(self._parameters, self._plan.entries, strict=True)
                move_parameters(pairs, rank=rank, copy=self._copy)
                self._copy = None
            else:
                self.commit()
            self._modules[""].to(device)
        for index, _ in self._sharded_entries():
            if not is_4bit(self._parameters[index]):  # which has no gradients
                replace_data(self._parameters[index], self._parameters[index].data)
        torch.clear_autocast_cache()  # it may have copies of the full weights

    def undo(self) -> None:
        """Back to the model as it was before this conversion. Not possible after ``commit``."""
        self._context.input.forget()  # of a backward that failed, whose graph it would keep
        while self._undo:
            self._undo.pop()()

    def switch_back(self) -> Callable[[], None]:
        """What undoes ``switch`` and ``keep_logits`` alone, also after ``commit``: the modules are
        as they were before, with the shards as their parameters. It keeps no model alive: a cycle
        would keep its memory."""
        steps, context = self._undo[self._unswitched :], self._context

        def back() -> None:
            context.input.forget()
            while steps:
                steps.pop()()

        return back

    def _sharded_entries(self) -> list[tuple[int, Entry]]:
        return [
            (index, entry)
            for index, entry in enumerate(self._plan.entries)
            if entry.is_sharded and not entry.is_tied
        ]

    def _switch_layer(self, layer: Layer, siblings: Sequence[Mapping[str, Tensor | None]]) -> None:
        module = self._modules[layer.module]
        if layer.kind is Kind.HEADS and not takes_per_head_bias(module):
            return
        entry = None if layer.weight < 0 else self._plan.entries[layer.weight]
        if layer.kind in WRAPPERS:
            divided = [self._plan.entries[i].name.rpartition(".")[2] for i in layer.divided]
            cls = wrapper_class(module, layer.kind, divided=divided, ranks=self._group.size)
        else:
            cls = sharded_class(module, layer.kind)
        self._undo.append(set_class(module, cls))
        sharding = LayerSharding(
            group=self._group,
            layout=ShardLayout(*layer.features),
            gather_output=layer.gather_output,
            split_input=layer.split_input,
            context=self._context,
            siblings=tuple(siblings),
            opens_region=layer.opens_region,
            closes_region=layer.closes_region,
            local_shapes=self._local_shapes(module),
        )
        self._undo.append(set_state(module, sharding))
        if layer.gathers_weight and not is_linear_4bit(module):
            read_full_weight(module, self._context, self._undo)
        if isinstance(module, nn.Linear) and entry is not None and entry.is_sharded:
            rows, columns = entry.local_shape(self._group.rank)
            self._assign(
                module, "out_features", module.out_features if layer.gather_output else rows
            )
            self._assign(
                module, "in_features", module.in_features if layer.split_input else columns
            )

    def _local_shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Of shards that are another part of the tensor on each rank, by name."""
        found = {}
        for name, parameter in own_parameters(module).items():
            entry = self._entries.get(id(parameter))
            shapes = (entry.local_shape(rank) for rank in range(self._group.size)) if entry else ()
            if entry is not None and entry.shape not in shapes:
                found[name] = entry.local_shape(self._group.rank)
        return found

    def _assign(self, module: nn.Module, key: str, value: Any) -> None:
        attributes = module.__dict__
        was_there, before = key in attributes, attributes.get(key)
        attributes[key] = value
        owner = weakref.ref(module)

        def back() -> None:
            module = owner()
            attributes = {} if module is None else module.__dict__
            if was_there:
                attributes[key] = before
            else:
                attributes.pop(key, None)

        self._undo.append(back)

    def _swap_data(self, parameter: nn.Parameter, data: Tensor) -> None:
        before = parameter.data
        replace_data(parameter, data)
        self._undo.append(lambda: replace_data(parameter, before))


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give ``parameter`` other data, and autograd a new end for its gradients.

    The end of before checks them against the shape of before, for as long as any graph lives that
    leads there. torch makes another one where the data type changes, and else keeps it.
    """
    other = torch.float32 if data.dtype == torch.float64 else torch.float64
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data
