# SPDX-License-Identifier: Apache-2.0
"""The same three steps on the ranks of a TP group, and what is gathered from them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import deepspeed_autotp
from tests.support.prove.case import Case
from tests.support.prove.encoders import KINDS
from tests.support.prove.families import checkpoint_family
from tests.support.prove.gathered import Masks, full_masks, gradients, take_masks
from tests.support.prove.names import ENCODERS
from tests.support.prove.refusals import refusals
from tests.support.prove.rules import apart_rules, own_rules, random_rules
from tests.support.prove.training import (
    CLIP,
    STEPS,
    Curve,
    add_lora,
    backward,
    batch,
    casting,
    clip_values,
    evaluate,
    lora_targets,
    loss_of,
    make,
    make_optimizer,
    make_schedule,
    most_norm,
    skip,
    squares,
)
from tests.support.replica_difference import replica_difference


class Sharded:
    """A sharded model, its optimizer or engine, and the masks that its dropouts drew."""

    def __init__(
        self, case: Case, dtype: torch.dtype, folder: str, *, drawn: int | None = None
    ) -> None:
        """``folder`` is an empty one for files; ``drawn`` the seed of its weights, if not that of
        the case."""
        self.case, self.dtype, self.drawn = case, dtype, drawn
        self.tp = dist.get_world_size() // case.replicas
        self.engine: Any = None
        mesh = init_device_mesh("cpu", (case.replicas, self.tp), mesh_dim_names=("dp", "tp"))
        torch.set_num_threads(1)
        self.others = mesh["dp"].get_group()
        self.model = self.from_files(folder) if case.start == "files" else self.build()
        self.schedule: Any = None
        if case.way.startswith("zero"):
            self.make_engine()
        elif case.start != "files":
            self.parallelize(mesh["tp"])
        self.called: Any = self.outer
        if case.functional:
            self.called = self.call_functional
        if case.way == "ddp":
            self.called = DistributedDataParallel(
                self.model,
                process_group=self.others,
                # RoBERTa has a bias that is not used where its embedding is not tied.
                find_unused_parameters=case.skipped != ""
                or case.trunk != ""
                or case.family in ENCODERS,
            )
        elif case.way == "fsdp":
            for block in blocks_of(self.model):
                fully_shard(block, mesh=mesh["dp"])
            fully_shard(self.model, mesh=mesh["dp"])
        if case.compiled:
            # A rank that has compiled more models before reaches the limit of recompilations alone,
            # and what it runs uncompiled sums by other means than the other ranks' graphs.
            torch.compiler.reset()
            self.outer.compile(backend=case.compiled)
        add_hooks(case, self.model)
        if self.engine is None:
            self.optimizer = make_optimizer(case, self.model)
            self.schedule = make_schedule(case, self.optimizer)
        self.masks: list[Masks] = []
        take_masks(self.model)

    @property
    def outer(self) -> Any:
        """The engine, or the model where there is none."""
        return self.model if self.engine is None else self.engine

    def call_functional(self, *args: Any, **kwargs: Any) -> Any:
        """With each module under one of its names: in one that is given under two names, torch
        leaves the given tensors in the place of its parameters."""
        made: dict[int, Tensor] = {}
        given = {}
        for prefix, module in self.model.named_modules():
            for name, parameter in module.named_parameters(prefix, False, False):
                given[name] = made.setdefault(id(parameter), 1.0 * parameter)
        return torch.func.functional_call(self.model, given, args, kwargs, tie_weights=False)

    def section(self, model: nn.Module) -> dict[str, Any]:
        case = self.case
        section: dict[str, Any] = {"sequence_parallel": case.sequence}
        if case.expert_partition:
            section["expert_partition"] = case.expert_partition
        rules = own_rules(case) if case.rules == "own" else None
        if case.rules == "apart":
            rules = apart_rules(model)
        if case.rules == "random":
            rules = random_rules(case, model)
        if rules is not None:
            are_alone = case.rules in ("own", "apart") or case.seed % 2 == 0
            section["partition_config"] = {"layer_specs": rules, "use_default_specs": not are_alone}
        if case.check == "false" and rules is not None:
            section["self_check"] = False
        return section

    def examples(self) -> dict[str, Any] | None:
        """What the self-check is given; nothing in most cases where it finds out by itself."""
        case = self.case
        if case.family or (case.lora != "before" and case.seed % 3):
            return None
        ids, targets = batch(case, 9)
        if case.signature == "logits":
            return {"idx": ids}
        names = ("tokens", "targets") if case.signature == "loss" else ("input_ids", "labels")
        return dict(zip(names, (ids, targets), strict=True))

    def build(self) -> nn.Module:
        case = self.case
        if case.start == "rank 0" and dist.get_rank() % self.tp > 0:
            with torch.device("meta"):
                return self.make()
        model = self.make()
        if case.lora == "before":
            return add_lora(case, model, lora_targets(case, model))
        return model

    def make(self) -> nn.Module:
        return make(self.case, self.dtype, drawn=self.drawn)

    def parallelize(self, mesh: Any) -> None:
        model = self.model
        with refusals():
            deepspeed_autotp.parallelize(
                model, mesh=mesh, config=self.section(model), example_inputs=self.examples()
            )
        if self.case.lora == "after":
            unsharded = self.make()
            names = lora_targets(self.case, unsharded)
            full = add_lora(self.case, unsharded, names).state_dict()
            self.model = add_lora(self.case, model, names)
            self.model.load_state_dict(full)

    def from_files(self, folder: str) -> nn.Module:
        import transformers

        name = "AutoModelForCausalLM"
        if self.case.family in ENCODERS:
            name = KINDS[self.case.family].model
        files = str(Path(folder, "pretrained"))
        if dist.get_rank() == 0:
            self.make().save_pretrained(files)  # type: ignore[operator]
        dist.barrier()
        with refusals():
            model: nn.Module = deepspeed_autotp.from_pretrained(
                getattr(transformers, name),
                files,
                tp_size=self.tp,
                config=self.section(nn.Module()),
                dtype=self.dtype,
            )
        # transformers lets what a class has frozen be trained once it is loaded, as tables of
        # positions: without a gradient, which torch passes over and DeepSpeed takes for zeros.
        trained = {name: p.requires_grad for name, p in self.make().named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        model.set_experts_implementation("eager")  # type: ignore[operator]
        checkpoint_family(self.case, model)
        return model.train()

    def make_engine(self) -> None:
        case, model = self.case, self.model
        micro = case.rows // case.replicas // case.accumulate
        zero: dict[str, Any] = {"stage": int(case.way[-1])}
        if case.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        config = {
            "train_micro_batch_size_per_gpu": micro,
            "train_batch_size": micro * case.accumulate * dist.get_world_size(),
            "gradient_accumulation_steps": case.accumulate,
            "gradient_clipping": CLIP if case.clip else 0.0,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": case.precision == "bfloat16"},
            "tensor_parallel": {"autotp_size": self.tp, **self.section(model)},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        optimizer = make_optimizer(case, model)
        schedule = make_schedule(case, optimizer)
        with refusals():
            self.engine, *_ = deepspeed_autotp.initialize(
                model=model,
                optimizer=optimizer,
                lr_scheduler=schedule,
                config=config,
                example_inputs=self.examples(),
            )

    def train(self, curve: Curve, first: int = 0, last: int = STEPS) -> None:
        for step in range(first, last):
            skip(self.case, self.model, step)
            total = torch.zeros((), dtype=torch.float64)
            losses = (self.loss(ids, targets) for ids, targets in self.chunks(step))
            for loss in list(losses) if self.case.forwards_first else losses:
                total += self.backward(loss)
                if self.engine is not None and self.engine.is_gradient_accumulation_boundary():
                    is_plain = self.case.way == "zero 0" and self.case.precision != "bfloat16"
                    curve.gradients.append(gradients(self.model, of_engine=not is_plain))
                if self.engine is not None:
                    self.engine.step()
            dist.all_reduce(total)
            curve.losses.append(float(total) / dist.get_world_size())
            if self.engine is None:
                self.average()
                curve.gradients.append(gradients(self.model))
                most = most_norm(self.case)
                curve.norms.append(float(deepspeed_autotp.clip_grad_norm_(self.model, most)))
                clip_values(self.case, self.model)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.schedule is not None:
                    self.schedule.step()
            else:
                norm = self.engine.get_global_grad_norm()
                # DeepSpeed forms none without ZeRO and clipping.
                curve.norms.append(None if norm is None else float(norm))
            self.masks.append(take_masks(self.model))
            if step == STEPS - 2:
                self.between()

    def chunks(self, step: int) -> Any:
        case = self.case
        own = (each.chunk(case.replicas)[dist.get_rank() // self.tp] for each in batch(case, step))
        return zip(*(each.chunk(case.accumulate) for each in own), strict=True)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        with casting(self.case):
            return loss_of(self.case, self.called, ids, targets)

    def backward(self, loss: Tensor) -> Tensor:
        differentiated = loss + squares(self.case, self.model)
        if self.engine is None:
            backward(self.case, differentiated / self.case.accumulate)
        else:
            self.engine.backward(differentiated)
        return loss.detach().double() / self.case.accumulate

    def average(self) -> None:
        """Gradients over the data-parallel replicas, where no engine does it."""
        if self.case.replicas > 1 and self.case.way == "parallelize":
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=self.others)
                    parameter.grad /= self.case.replicas

    def between(self) -> None:
        """As :func:`training.between`, of shards."""
        kind = self.case.between
        if kind == "gather":
            with deepspeed_autotp.gather_params(self.model, modifier_rank=0), torch.no_grad():
                for parameter in self.model.parameters():
                    parameter *= 1.01
        elif kind == "reload":
            full = deepspeed_autotp.full_state_dict(self.model)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.zero_()
            self.model.load_state_dict(full)
        elif kind == "evaluate":
            evaluate(self.case, self.model, self.called)
        elif kind == "thaw":
            for parameter in self.model.parameters():
                parameter.requires_grad_(True)

    def finish(self, curve: Curve) -> None:
        """What is compared after the last step."""
        curve.replicas = replica_difference(self.outer)
        curve.weights = deepspeed_autotp.full_state_dict(self.outer)
        curve.evaluated = evaluate(self.case, self.model, self.called)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.destroy()

    def share(self) -> float:
        """Of the parameters, on this rank, whatever ZeRO and FSDP leave of them there."""
        return held(self.model) / held(make(self.case, self.dtype))

    def save(self, folder: str) -> None:
        if self.engine is not None:
            self.engine.save_checkpoint(folder)
            return
        dcp.save(self.state(), checkpoint_id=folder)
        if self.schedule is not None and dist.get_rank() == 0:
            torch.save(self.schedule.state_dict(), Path(folder, "schedule.pt"))
        dist.barrier()

    def load(self, folder: str) -> None:
        if self.engine is not None:
            path, _ = self.engine.load_checkpoint(folder)
            assert path is not None
            return
        dcp.load(self.state(), checkpoint_id=folder)
        if self.schedule is not None:
            self.schedule.load_state_dict(torch.load(Path(folder, "schedule.pt")))

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = deepspeed_autotp.checkpoint_state(self.model, self.optimizer)
        return found


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers of the first list of layers."""
    return list(next((m for m in model.modules() if isinstance(m, nn.ModuleList)), []))


def add_hooks(case: Case, model: nn.Module) -> None:
    """Hooks that look and change nothing."""
    for module in model.modules() if case.hooks else ():
        if case.hooks == "forward":
            module.register_forward_hook(lambda m, args, y: None)
        elif isinstance(module, nn.Linear):
            module.register_full_backward_hook(lambda m, grads, outputs: None)


@contextmanager
def opened(
    case: Case, dtype: torch.dtype, folder: str, *, drawn: int | None = None
) -> Iterator[Sharded]:
    run = Sharded(case, dtype, folder, drawn=drawn)
    try:
        yield run
    finally:
        run.close()


def train_sharded(case: Case, dtype: torch.dtype, folder: str) -> tuple[Curve, list[Any], float]:
    """What three steps give, the masks of dropout, and the share of the parameters of a rank."""
    curve = Curve()
    with opened(case, dtype, folder) as run:
        with refusals():
            run.train(curve)
        run.finish(curve)
        masks = full_masks(case, run.model, run.masks) if case.dropout else []
        return curve, masks, run.share()


def train_and_save(case: Case, dtype: torch.dtype, folder: str) -> tuple[Curve, float]:
    """All but the last step, and a checkpoint in ``folder``."""
    curve = Curve()
    with opened(case, dtype, folder) as run:
        with refusals():
            run.train(curve, last=STEPS - 1)
        run.save(str(Path(folder, "checkpoint")))
        return curve, run.share()


def load_and_finish(case: Case, dtype: torch.dtype, folder: str) -> Curve:
    """The last step alone, of a model with other weights before it loads the checkpoint."""
    curve = Curve()
    with opened(case, dtype, folder, drawn=case.seed + 1) as run:
        run.load(str(Path(folder, "checkpoint")))
        with refusals():
            run.train(curve, first=STEPS - 1)
        run.finish(curve)
    return curve


def held(model: nn.Module) -> int:
    """Elements of the model's own parameters: adapters are in no unsharded model, and ZeRO 3 keeps
    the size of what it has partitioned in ``ds_numel``."""
    own = (p for name, p in model.named_parameters() if "lora_" not in name)
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in own)
