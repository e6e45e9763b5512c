# SPDX-License-Identifier: Apache-2.0
"""PEFT's changes to the modules of a model that is sharded already.

PEFT works on the modules as they were before they were sharded, with the shards as their weights:
it puts full adapters around them, or takes adapters away. Then the model is planned anew, with the
rules and options of before, and what was added is sharded as by ``parallelize``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from deepspeed_autotp._core import Entry, Plan
from deepspeed_autotp.api.adapter_merges import merge_into_shards
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.interop.deepspeed.auto_ep import is_expert
from deepspeed_autotp.interop.deepspeed.parameters import (
    full_shape,
    is_partitioned,
    stating_shapes,
)
from deepspeed_autotp.interop.fully_shard import fully_sharded_modules
from deepspeed_autotp.interop.peft import (
    ModuleChanges,
    Root,
    copies_of_modules,
    watch_peft,
    without_adapters,
)
from deepspeed_autotp.interop.peft_rollback import keep_adapters
from deepspeed_autotp.interop.torch_private import keep_modules
from deepspeed_autotp.interop.transformers import guard_save_pretrained
from deepspeed_autotp.layers.class_swap import changed_classes
from deepspeed_autotp.planning.agreed_plans import AgreedPlans
from deepspeed_autotp.planning.model_description import Description, ShapeOf, describe
from deepspeed_autotp.planning.plan_recipe import recipe
from deepspeed_autotp.planning.planner import PlanRequest, large_names
from deepspeed_autotp.sharding.conversion import Conversion, replace_data
from deepspeed_autotp.sharding.partition import shard_parameters
from deepspeed_autotp.sharding.weight_sync import broadcast_tensors
from deepspeed_autotp.state.full_weights import take_full_weights
from deepspeed_autotp.state.sharded_model import (
    TensorParallel,
    attach,
    container_of,
)

T = TypeVar("T")

_PREFIX = "base_model.model."


class AdapterChanges:
    """How one model was sharded, for what PEFT does to it afterwards."""

    def __init__(
        self,
        state: TensorParallel,
        *,
        settings: TPTrainingConfig,
        request: PlanRequest,
        conversion: Conversion,
    ) -> None:
        self._weak = weakref.ref(state)  # which has this: no cycle keeps the shards
        self._settings = settings
        self._request = request
        self._switch_back = conversion.switch_back()
        self._undo: list[Callable[[], None]] = []  # of what comes after the conversion
        self._is_changing = False

    @property
    def _state(self) -> TensorParallel:
        state = self._weak()
        assert state is not None
        return state

    @property
    def _root(self) -> nn.Module:
        model = self._state.model
        root = None if model is None else model()
        if root is None:
            raise ValueError("the sharded model is gone that these modules belong to; keep it")
        return root

    def start(self) -> None:
        """Let PEFT change the model from now on."""
        self._finish()
        self._state.changes = self
        watch_peft(find_changes)

    def add(
        self, change: Callable[[], T], *, check: Callable[[], None], root: Root | None = None
    ) -> T:
        """As of :class:`ModuleChanges`."""

        why = "would not know a new adapter; add adapters before initialize"
        return self._around(change, self._untrained(check, why), root)

    def remove(
        self, change: Callable[[], T], *, check: Callable[[], None], root: Root | None = None
    ) -> T:
        """As of :class:`ModuleChanges`."""

        why = (
            "and checkpoints would still have the adapter; save the adapter, and merge it into a "
            "model that no engine trains"
        )
        return self._around(change, self._untrained(check, why), root)

    def follow(
        self, replaced: Collection[str], routers: tuple[str, ...], agreement: Agreement
    ) -> None:
        """Plan the model anew after DeepSpeed's AutoEP has replaced modules of it: with the new
        ``routers``, and without the new experts. All ranks of ``agreement`` call it."""
        state = self._state
        self._undo_finish()

        def described() -> Description:
            found = describe(self._root, shape_of=self._shape_of({}), leaves_out=is_expert)
            return replace(found, replaced_later=routers)

        description = agreement.together(described)
        plans = AgreedPlans(
            description, self._settings, state.group.size, agreement, is_checked=True
        )
        request = self._request_for(self._root, plans_before=state.plan)
        others = (name for name in request.replicated if name not in replaced)
        plan = plans.again(replace(request, replicated=(*routers, *others)))
        agreement.together(lambda: self._check_same(plan, description, {}))
        self._request = plans.request_of(plan)
        state.set_plan(plan, description.parameters)
        state.recipe = None  # experts are in no plan
        self._finish()

    def _untrained(self, check: Callable[[], None], why: str) -> Callable[[], None]:
        """``check``, and that no engine trains the model."""

        def check_all() -> None:
            check()
            if self._state.masters is not None:
                raise ValueError(
                    f"an engine of DeepSpeed trains this model, and its optimizer {why}"
                )

        return check_all

    def _around(self, change: Callable[[], T], check: Callable[[], None], root: Root | None) -> T:
        if self._is_changing:  # what PEFT does within such a change
            check()
            return change()
        if self._state.group.is_closed:
            raise ValueError("the model was destroyed, and its adapters cannot be changed")
        agreement = Agreement(self._state.group.cpu_handle)
        agreement.together(lambda: self._check(check))
        before = self._root
        put_back: list[Callable[[], None]] = []
        unmerge: list[Callable[[], None]] = []
        self._is_changing = True
        try:
            self._unswitch()
            keep_notes, unmerge_since = keep_adapters(before)
            put_back += [keep_modules(before), keep_notes]
            unmerge.append(unmerge_since)
            self._undo += merge_into_shards(self._state, self._root)
            with stating_shapes(self._sharded()):
                result = agreement.together(change)
            self._shard_again(before if root is None else root(), agreement)
        except BaseException:
            self._unswitch()
            for step in put_back:
                step()
            self._switch(self._described(before, {}), self._state.plan)
            self._finish()
            for step in unmerge:
                step()
            raise
        finally:
            self._is_changing = False
        return result

    def _check(self, check: Callable[[], None]) -> None:
        state = self._state
        if state.is_gathered:
            raise ValueError("adapters cannot be changed within gather_params; leave it first")
        if any(map(is_partitioned, state.parameters)):
            raise ValueError(
                "ZeRO 3 has partitioned the weights, and adapters cannot be changed any more: add "
                "them before initialize; to merge them, save the adapter and merge it into an "
                "unsharded model"
            )
        if fully_sharded_modules(self._root):
            raise ValueError(
                "fully_shard has partitioned the weights, and adapters cannot be changed any more: "
                "add them before fully_shard"
            )
        changed = changed_classes(self._root)
        if changed:
            raise ValueError(
                f"the class of {changed[0]!r} was changed after the model was sharded, as by "
                "torch.nn.utils.parametrize, and adapters would undo that; add adapters before "
                "the model is sharded"
            )
        check()

    def _sharded(self) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """Each sharded parameter once, and its full shape."""
        pairs = zip(self._state.parameters, self._state.plan.entries, strict=True)
        return [(p, entry.shape) for p, entry in pairs if entry.is_sharded and not entry.is_tied]

    def _unswitch(self) -> None:
        self._undo_finish()
        self._switch_back()

    def _undo_finish(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _shard_again(self, root: nn.Module, agreement: Agreement) -> None:
        """Plan ``root`` and shard what is new in it. Until that all ranks may fail together."""
        self._undo_finish()
        originals = copies_of_modules(root)
        description = agreement.together(lambda: self._described(root, originals))
        state = self._state
        ranks = state.group.size
        plans = AgreedPlans(description, self._settings, ranks, agreement, is_checked=True)
        plan = plans.again(self._request_for(root, plans_before=state.plan))
        agreement.together(lambda: self._check_same(plan, description, originals))
        try:
            agreement.together(lambda: self._switch(description, plan))
            self._shard_new(description.parameters, plan, originals, agreement)
        except Exception:
            self._switch_back()
            raise
        self._request = plans.request_of(plan)
        if root is not self._root:
            attach(root, state)  # the model of before, inside or around, keeps it
            guard_save_pretrained(root, is_sharded=state.is_sharded)
        state.set_plan(plan, description.parameters)
        state.recipe = recipe(description, self._settings, self._request)
        self._finish()

    def _described(self, root: nn.Module, originals: dict[int, nn.Parameter]) -> Description:
        return describe(root, shape_of=self._shape_of(originals))

    def _shape_of(self, originals: dict[int, nn.Parameter]) -> ShapeOf:
        def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
            entry = self._state.entry(originals.get(id(parameter), parameter))
            return full_shape(parameter) if entry is None else entry.shape

        return shape_of

    def _request_for(self, root: nn.Module, *, plans_before: Plan) -> PlanRequest:
        """The request of before, by the names that modules have in ``root``."""
        prefix = "" if without_adapters(root) is root else _PREFIX

        def renamed(names: Sequence[str]) -> tuple[str, ...]:
            plain = (_without_base_layers(name.removeprefix(_PREFIX)) for name in names)
            return tuple(prefix + name for name in dict.fromkeys(plain))

        large = renamed(large_names(plans_before))
        return replace(
            self._request,
            replicated=renamed(self._request.replicated),
            individual=renamed(self._request.individual),
            all_tokens=renamed(self._request.all_tokens),
            large_names=(*large, *(f"{name}.base_layer" for name in large)),
        )

    def _check_same(
        self, plan: Plan, description: Description, originals: dict[int, nn.Parameter]
    ) -> None:
        """ValueError where a shard would have to be another one than it is, or than what it is a
        copy of. One tensor that is tied may be of another kind under another name."""
        ranks = self._state.group.size
        for entry, parameter in zip(plan.entries, description.parameters, strict=True):
            before = self._state.entry(parameter)
            original = originals.get(id(parameter))
            of = None if original is None else self._state.entry(original)
            if (before is not None and not _same_shards(entry, before, ranks)) or (
                of is not None and not _same_runs(entry, of, ranks)
            ):
                raise ValueError(
                    f"{entry.name} would be sharded otherwise with this adapter than it is; add "
                    "the adapter before the model is sharded"
                )

    def _shard_new(
        self,
        parameters: Sequence[nn.Parameter],
        plan: Plan,
        originals: dict[int, nn.Parameter],
        agreement: Agreement,
    ) -> None:
        """Shard the parameters that were not there before; a copy of a shard is one already."""
        added = {
            id(parameter): (parameter, entry)
            for parameter, entry in zip(parameters, plan.entries, strict=True)
            if self._state.entry(parameter) is None and id(parameter) not in originals
        }
        tensors: list[Tensor] = [parameter for parameter, _ in added.values()]
        group = self._state.group
        if tensors:
            broadcast_tensors("the adapters", tensors, group, agreement=agreement, keep=False)
        sharded = [(p, e) for p, e in added.values() if e.is_sharded and not e.is_tied]
        with torch.no_grad():
            shard_parameters(sharded, rank=group.rank)
            for parameter, _ in sharded:
                replace_data(parameter, parameter.data)

    def _switch(self, description: Description, plan: Plan) -> None:
        overlap, insist = self._settings.overlaps, self._settings.vocab_parallel_lm_head is True
        conversion = Conversion(description, plan=plan, group=self._state.group, overlap=overlap)
        try:
            conversion.switch()
            conversion.keep_logits(insist=insist)
        except Exception:
            conversion.undo()
            raise
        self._switch_back = conversion.switch_back()

    def _finish(self) -> None:
        """Let modules load full tensors, and adapters merge into shards."""
        self._undo += take_full_weights(self._root, self._state)
        self._undo += merge_into_shards(self._state, self._root)


def find_changes(model: nn.Module) -> ModuleChanges | None:
    """What changes the sharded model that ``model`` is, is inside of, or has inside."""
    if not isinstance(model, nn.Module):
        return None
    state = container_of(model.parameters())
    if state is not None and state.changes is None:
        raise ValueError(
            "this is a copy of a sharded model, whose adapters cannot be changed; change those of "
            "the model itself, or add adapters before"
        )
    return None if state is None else state.changes


def _without_base_layers(name: str) -> str:
    """``name`` without the parts that PEFT adds."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _same_shards(one: Entry, other: Entry, ranks: int) -> bool:
    return one.kind == other.kind and _same_runs(one, other, ranks)


def _same_runs(one: Entry, other: Entry, ranks: int) -> bool:
    return (one.dim, one.shape) == (other.dim, other.shape) and (
        not one.is_sharded or all(one.runs(rank) == other.runs(rank) for rank in range(ranks))
    )
