# SPDX-License-Identifier: Apache-2.0
"""What has to be known and done around the making of DeepSpeed's engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import nn

from deepspeed_autotp.api.adapters import AdapterChanges
from deepspeed_autotp.api.engine_checkpoints import watch_shards, watch_unsharded
from deepspeed_autotp.api.engine_checks import (
    check_groups,
    check_made_optimizer,
    check_optimizer,
    check_tp_size,
    compared_settings,
)
from deepspeed_autotp.api.engine_metrics import check_monitor, engine_tp_group, write_metrics
from deepspeed_autotp.api.expert_parallel import (
    expert_blocks,
    new_routers,
    refuse_unlike_experts,
    replaceable,
    replaced_modules,
    starting,
)
from deepspeed_autotp.api.pipeline import described, settled, shard
from deepspeed_autotp.api.skipped_model import finish_skipped, skip
from deepspeed_autotp.checkpoint.atomic_folder import replaced
from deepspeed_autotp.checkpoint.full_state import rank0_state_dict
from deepspeed_autotp.checkpoint.layout import Layout
from deepspeed_autotp.checkpoint.universal import parameter_meta, universal_info
from deepspeed_autotp.config.load_config import load_ds_config, refuse_misspelt_section
from deepspeed_autotp.config.merge_recorded_args import compare, copied, fill_settings
from deepspeed_autotp.config.recorded_args import RECORDS, Recorded
from deepspeed_autotp.config.refused_options import refuse_options
from deepspeed_autotp.config.tp_size import refuse_unfilled_auto
from deepspeed_autotp.config.training_config import (
    TPTrainingConfig,
    deepspeed_section,
    get_tensor_parallel_config,
)
from deepspeed_autotp.config.validation import wrong
from deepspeed_autotp.distributed.consensus import Agreement, world_agreement
from deepspeed_autotp.distributed.lost_ranks import LostRanks
from deepspeed_autotp.distributed.owned_groups import OwnedGroups
from deepspeed_autotp.interop.deepspeed.auto_ep import ExpertBlock, leave_uncompiled
from deepspeed_autotp.interop.deepspeed.engine import (
    drop_batch_comparison,
    enter_in_calls,
    gather_weights_on_save,
    on_destroy,
    refuse_engine_record,
    refuse_pipeline,
    settle_engine_config,
    skip_everything,
)
from deepspeed_autotp.interop.deepspeed.grad_norm import count_weights_once
from deepspeed_autotp.interop.deepspeed.groups import engine_group, timeout_of_default_group
from deepspeed_autotp.interop.deepspeed.kept_gradients import keep_gradients
from deepspeed_autotp.interop.deepspeed.loss_scale import scale_on_all_ranks
from deepspeed_autotp.interop.deepspeed.master_weights import MasterWeights
from deepspeed_autotp.interop.deepspeed.parameters import (
    mark_model,
    mark_parameters,
    mark_universal,
)
from deepspeed_autotp.interop.deepspeed.save_16bit_model import save_full_weights
from deepspeed_autotp.planning.agreed_plans import compared
from deepspeed_autotp.planning.model_description import Description, describe, styles_of
from deepspeed_autotp.planning.planner import skips_all
from deepspeed_autotp.self_check.inferred_inputs import TrainingData
from deepspeed_autotp.sharding.weight_location import RankReport, refuse_unlike
from deepspeed_autotp.state.grad_norm import GradNorm, clip_grad_norm_
from deepspeed_autotp.state.grad_scaler import GradScaler
from deepspeed_autotp.state.replica_check import check_calls
from deepspeed_autotp.state.replica_drift import compare_replicas
from deepspeed_autotp.state.sharded_model import (
    TensorParallel,
    find_tensor_parallel,
    sharded_4bit,
    tensor_parallel,
)

_log = logging.getLogger("deepspeed_autotp")


@dataclass(frozen=True, slots=True)
class _Prepared:
    """``settings`` is None where there is nothing to shard; ``config`` is DeepSpeed's.

    ``compared`` has to be the same on every rank. ``description`` is of a model that is not sharded
    yet, and is to be; ``skips`` says that its rules leave all of it as it is. ``experts`` are the
    blocks that AutoEP replaces.
    """

    config: dict[str, Any]
    settings: TPTrainingConfig | None
    compared: Mapping[str, str]
    description: Description | None = None
    skips: bool = False
    experts: tuple[ExpertBlock, ...] = ()


class EngineSetup:
    """What is done around the making of one engine, on all ranks of the run together.

    A context in which an error closes what was made.
    """

    def __init__(
        self,
        model: Any,
        *,
        mpu: Any,
        mesh_param: Any,
        optimizer: Any,
        example_inputs: Mapping[str, object] | None,
        data: TrainingData | None,
    ) -> None:
        self._model = model
        self._example_inputs = example_inputs
        self._data = data
        self._mpu = mpu
        self._mesh_param = mesh_param
        self._optimizer = optimizer
        self._owned = OwnedGroups()
        self._agreement = world_agreement(self._owned)
        self._shards = False
        self._skips = False
        self._monitors = False
        self._experts: tuple[ExpertBlock, ...] = ()
        assert dist.group.WORLD is not None
        self._lost = LostRanks.of(dist.group.WORLD, "DeepSpeed's engine")
        self._on_close = ExitStack()
        self._on_close.callback(self._owned.close)

    def __enter__(self) -> EngineSetup:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.close()

    def shard(self, given: Callable[[], Any]) -> dict[str, Any]:
        """Check everything, shard the model over the engine's group, and return DeepSpeed's
        configuration; ``given()`` is the user's. ValueError as of ``initialize``."""

        def prepare() -> tuple[_Prepared, Mapping[str, str], Description | None]:
            ready = self._prepare(given())
            return ready, ready.compared, ready.description

        prepared, description, reports = settled(self._agreement, prepare)
        if prepared.settings is not None and prepared.skips:
            self._skips = True
            skip(self._model, prepared.settings.autotp_size, agreement=self._agreement)
        elif prepared.settings is not None:
            self._shards, self._monitors = True, prepared.settings.monitor
            self._experts = prepared.experts
            refuse_unlike_experts(
                self._model,
                prepared.experts,
                section=prepared.config.get("expert_parallel"),
                tp_size=prepared.settings.autotp_size,
                agreement=self._agreement,
            )
            self._shard(prepared.settings, description, reports)
        return prepared.config

    def parameters(self, given: Any) -> Any:
        """The user's ``model_parameters``, as the engine has to be given them."""
        return replaceable(self._experts, given)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """A context in which DeepSpeed's engine can start. Where it is of a sharded model, its
        groups have the timeout of the run."""
        with starting(self._experts), timeout_of_default_group() if self._shards else nullcontext():
            yield

    def finish(self, engine: Any) -> None:
        """Let ``engine`` save and load what a sharded model needs, and close with it what was made
        for it."""
        if self._shards:
            check_made_optimizer(engine.basic_optimizer, given=self._optimizer)
            if self._experts:
                self._follow_experts()
            _finish(engine, self._model, agreement=self._agreement, on_close=self._on_close)
            group = tensor_parallel(self._model).group
            write_metrics(engine, group, is_asked=self._monitors)
            enter_in_calls(engine, self._lost)
            on_destroy(engine, self.close)
            return
        self.close()
        if self._skips:
            finish_skipped(engine, self._model)
        else:
            watch_unsharded(engine)

    def close(self) -> None:
        """Close the process groups that were made for this engine. All ranks call it."""
        self._on_close.close()

    def _shard(
        self,
        settings: TPTrainingConfig,
        description: Description | None,
        reports: Sequence[RankReport],
    ) -> None:
        """Shard the model over the engine's group, unless it is, and tell DeepSpeed so."""
        if description is not None:
            refuse_unlike(reports, settings.autotp_size)
            self._lost.hosts = {each.rank: str(each.host) for each in reports}
        handle = engine_group(tp_size=settings.autotp_size)
        if description is None:
            state = tensor_parallel(self._model)
            if state.group.is_closed:  # with an engine before this one
                state.group.reopen(handle)
                self._on_close.callback(state.group.leave, state)
        else:
            with ExitStack() as on_failure:
                group = engine_tp_group(handle, settings)
                on_failure.callback(group.close)
                state = shard(
                    description,
                    settings=settings,
                    group=group,
                    agreement=self._agreement,
                    reports=reports,
                    example_inputs=self._example_inputs,
                    data=self._data,
                )
                on_failure.pop_all()
            self._on_close.callback(group.leave, state)
        state.group.join(state)  # anew, where it has left
        mark_model(self._model)
        self._mark(state)

    def _follow_experts(self) -> None:
        """Know of the routers and experts that the engine has put into the model."""
        state = tensor_parallel(self._model)
        assert isinstance(state.changes, AdapterChanges)
        state.changes.follow(
            replaced_modules(self._experts), new_routers(self._experts), self._agreement
        )
        state.expert_blocks = self._experts
        leave_uncompiled(self._model, self._experts)
        self._mark(state)

    def _mark(self, state: TensorParallel) -> None:
        """Tell DeepSpeed of the parameters in the plan."""
        mark_parameters(state.parameters, gatherer=state, counted=state.counts_in_norm)
        layout = Layout.of_plan(state.plan)
        described = list(zip(state.parameters, layout.parameters.values(), strict=True))
        mark_universal(
            self._model,
            universal_info(
                layout,
                frozen=[p.name for t, p in described if not t.requires_grad],
                experts=[f"{block.name}.experts" for block in state.expert_blocks],
            ),
            [(t, parameter_meta(p, layout.ranks)) for t, p in described if p.tied_to is None],
        )

    def _prepare(self, given: Any) -> _Prepared:
        """Read, merge and check everything that does not need the model's weights.

        ValueError for whatever cannot be right; nothing has changed then.
        """
        model, mpu = self._model, self._mpu
        if not isinstance(model, nn.Module):
            raise ValueError(f"initialize: model: {wrong(model, 'a torch.nn.Module')}")
        refuse_engine_record()
        config = copied(load_ds_config(given))
        settings = self._merged(config)
        check_tp_size(model, settings, has_mpu=mpu is not None)
        if settings.autotp_size <= 1:
            return _Prepared(config, None, {"tensor_parallel.autotp_size": "0 or 1"})
        refuse_pipeline(model)
        refuse_options(config, mesh_param=self._mesh_param)
        check_groups(settings, mpu)
        check_optimizer(self._optimizer, config)
        gather_weights_on_save(config)
        replicas = dist.get_world_size() // settings.autotp_size
        checked = settle_engine_config(config, mpu=mpu, replicas=replicas)
        found = find_tensor_parallel(model)
        check_monitor(settings, config, found)
        experts = expert_blocks(
            model,
            checked,
            settings,
            section=config.get("expert_parallel"),
            optimizer=self._optimizer,
            before=found,
        )
        skips = found is None and skips_all(styles_of(model), lambda: describe(model), settings)
        if skips and experts:
            raise ValueError(
                "tensor_parallel.partition_config: got rules that skip all of the model beside "
                "expert_parallel, expected rules that shard some of it; write others, or leave "
                "tensor_parallel out"
            )
        state = "left as it is" if skips else _state_of(found)
        if skips:
            skip_everything(config)
        description = None if skips or found is not None else described(model)
        if description is not None:
            description = replace(description, replaced_later=replaced_modules(experts))
        return _Prepared(
            config,
            settings,
            compared(settings) | compared_settings(config) | {"the model": state},
            description,
            skips,
            experts,
        )

    def _merged(self, config: dict[str, Any]) -> TPTrainingConfig:
        """The section with what was recorded; in ``config`` it becomes DeepSpeed's."""
        settings = get_tensor_parallel_config(config)
        recorded = _record_of(self._model, warn=self._agreement.is_first)
        fill = compare(
            config, recorded, mpu=self._mpu, mesh_param=self._mesh_param, dist_module=dist
        )
        if recorded is not None:
            settings = fill_settings(settings, fill, recorded)
        else:
            refuse_unfilled_auto(config)
            refuse_misspelt_section(config)
        if recorded is not None or "tensor_parallel" in config:
            section = deepspeed_section(settings)
            # DeepSpeed makes the groups itself, and prints its configuration as JSON.
            section["tp"] = {"tp_size": section["tp"]["tp_size"]}
            config["tensor_parallel"] = section
        return settings


def _forget(state: TensorParallel, masters: MasterWeights) -> None:
    """Let the optimizer of a destroyed engine be none, unless another engine has come since."""
    if state.masters is masters:
        state.masters = None


def _record_of(model: nn.Module, *, warn: bool) -> Recorded | None:
    recorded = RECORDS.of(model)
    if recorded is None and RECORDS.any_alive() and warn:
        _log.warning(
            "tp_model_init recorded arguments for another model; they do not hold for this %s",
            type(model).__name__,
        )
    return recorded


def _state_of(state: TensorParallel | None) -> str:
    where = "sharded, and destroyed" if state is not None and state.group.is_closed else "sharded"
    return "unsharded" if state is None else where


def _finish(engine: Any, model: nn.Module, *, agreement: Agreement, on_close: ExitStack) -> None:
    """``agreement`` spans all ranks of the run; it serves every checkpoint."""
    save_full_weights(
        engine,
        full_state=lambda frozen: rank0_state_dict(model, frozen=frozen),
        replaced=replaced,
        leaves_out=bool(sharded_4bit(model.parameters())),
    )
    state = tensor_parallel(model)
    masters = state.masters = MasterWeights(engine.optimizer)
    on_close.callback(_forget, state, masters)
    count_weights_once(engine, GradNorm(state), clip=lambda most: clip_grad_norm_(model, most))
    keep_gradients(engine)
    scale_on_all_ranks(engine, scaler=lambda device: GradScaler(device, model=model))
    watch_shards(engine, model, agreement=agreement)
    drop_batch_comparison(engine)
    check_calls(state)
    compare_replicas(state)
