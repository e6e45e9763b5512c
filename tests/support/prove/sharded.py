# SPDX-License-Identifier: Apache-2.0
"""The same three steps on the ranks of a TP group, and what is gathered from them."""

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import deepspeed_autotp
from tests.support.prove.case import Case
from tests.support.prove.families import checkpoint_family
from tests.support.prove.norms import Dropout
from tests.support.prove.rules import apart_rules, own_rules, random_rules
from tests.support.prove.training import (
    CLIP,
    STEPS,
    Curve,
    Gradients,
    add_lora,
    batch,
    casting,
    evaluate,
    lora_targets,
    loss_of,
    make,
    make_optimizer,
)
from tests.support.replica_difference import replica_difference

Masks = dict[str, list[Tensor]]


class Sharded:
    """A sharded model, its optimizer or engine, and the masks that its dropouts drew."""

    def __init__(self, case: Case, dtype: torch.dtype, *, tp: int) -> None:
        self.case, self.dtype, self.tp = case, dtype, tp
        self.replicas = dist.get_world_size() // tp
        self.engine: Any = None
        mesh = init_device_mesh("cpu", (self.replicas, tp), mesh_dim_names=("dp", "tp"))
        torch.set_num_threads(1)
        self.others = mesh["dp"].get_group()
        if case.start == "files":
            self.model = self.from_files(tp)
        elif not case.way.startswith("zero"):
            self.model = self.parallelized(mesh["tp"])
        else:
            self.model = self.with_engine(tp)
        self.called: Any = self.model if self.engine is None else self.engine
        if case.way == "ddp":
            self.called = DistributedDataParallel(self.model, process_group=self.others)
        elif case.way == "fsdp":
            for block in blocks_of(self.model):
                fully_shard(block, mesh=mesh["dp"])
            fully_shard(self.model, mesh=mesh["dp"])
        if case.compiled:
            self.model.compile()
        add_hooks(case, self.model)
        self.optimizer = make_optimizer(case, self.model) if self.engine is None else None
        self.masks: list[Masks] = []
        take_masks(self.model)

    def section(self, model: nn.Module) -> dict[str, Any]:
        case = self.case
        section: dict[str, Any] = {"sequence_parallel": case.sequence}
        rules = own_rules(case) if case.rules == "own" else None
        if case.rules == "apart":
            rules = apart_rules(model)
        if case.rules == "random":
            rules = random_rules(case, model)
        if rules is not None:
            whole = case.rules in ("own", "apart") or case.seed % 2 == 0
            section["partition_config"] = {"layer_specs": rules, "use_default_specs": not whole}
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
                return make(case, self.dtype)
        model = make(case, self.dtype)
        if case.lora == "before":
            return add_lora(case, model, lora_targets(case, model))
        return model

    def parallelized(self, mesh: Any) -> nn.Module:
        model = self.build()
        deepspeed_autotp.parallelize(
            model, mesh=mesh, config=self.section(model), example_inputs=self.examples()
        )
        if self.case.lora == "after":
            unsharded = make(self.case, self.dtype)
            names = lora_targets(self.case, unsharded)
            full = add_lora(self.case, unsharded, names).state_dict()
            model = add_lora(self.case, model, names)
            model.load_state_dict(full)
        return model

    def from_files(self, tp: int) -> nn.Module:
        from transformers import AutoModelForCausalLM

        folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [""]
        dist.broadcast_object_list(folder)
        if dist.get_rank() == 0:
            make(self.case, self.dtype).save_pretrained(folder[0])  # type: ignore[operator]
        dist.barrier()
        section = self.section(nn.Module())
        model: nn.Module = deepspeed_autotp.from_pretrained(
            AutoModelForCausalLM, folder[0], tp_size=tp, config=section, dtype=self.dtype
        )
        model.set_experts_implementation("eager")  # type: ignore[operator]
        checkpoint_family(self.case, model)
        return model.train()

    def with_engine(self, tp: int) -> nn.Module:
        case, model = self.case, self.build()
        micro = case.rows // self.replicas // case.accumulate
        config = {
            "train_micro_batch_size_per_gpu": micro,
            "train_batch_size": micro * case.accumulate * dist.get_world_size(),
            "gradient_accumulation_steps": case.accumulate,
            "gradient_clipping": CLIP if case.clip else 0.0,
            "zero_optimization": {"stage": int(case.way[-1])},
            "tensor_parallel": {"autotp_size": tp, **self.section(model)},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        self.engine, *_ = deepspeed_autotp.initialize(
            model=model,
            optimizer=make_optimizer(case, model),
            config=config,
            example_inputs=self.examples(),
        )
        return model

    def train(self, curve: Curve, first: int = 0, last: int = STEPS) -> None:
        for step in range(first, last):
            total = torch.zeros((), dtype=torch.float64)
            for ids, targets in self.chunks(step):
                total += self.backward(ids, targets)
                if self.engine is not None and self.engine.is_gradient_accumulation_boundary():
                    self.average()
                    curve.gradients.append(gradients(self.model, zero=self.stage))
                if self.engine is not None:
                    self.engine.step()
            dist.all_reduce(total)
            curve.losses.append(float(total) / dist.get_world_size())
            if self.engine is None:
                self.average()
                curve.gradients.append(gradients(self.model))
                most = CLIP if self.case.clip else float("inf")
                curve.norms.append(float(deepspeed_autotp.clip_grad_norm_(self.model, most)))
                self.optimizer.step()
                self.optimizer.zero_grad()
            else:
                norm = self.engine.get_global_grad_norm()
                # DeepSpeed forms none without ZeRO and clipping.
                curve.norms.append(float("nan") if norm is None else float(norm))
            self.masks.append(take_masks(self.model))
            if step == STEPS - 2:
                self.between()

    @property
    def stage(self) -> int:
        return int(self.case.way[-1]) if self.engine is not None else 0

    def chunks(self, step: int) -> Any:
        case = self.case
        own = (
            each.chunk(self.replicas)[dist.get_rank() // (dist.get_world_size() // self.replicas)]
            if case.replicas > 1
            else each
            for each in batch(case, step)
        )
        return zip(*(each.chunk(case.accumulate) for each in own), strict=True)

    def backward(self, ids: Tensor, targets: Tensor) -> Tensor:
        with casting(self.case):
            loss = loss_of(self.case, self.called, ids, targets)
        if self.engine is None:
            (loss / self.case.accumulate).backward()
        else:
            self.engine.backward(loss)
        return loss.detach().double() / self.case.accumulate

    def average(self) -> None:
        """Gradients over the data-parallel replicas, where no engine does it."""
        if self.case.replicas > 1 and self.case.way == "parallelize":
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=self.others)
                    parameter.grad /= self.replicas

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
            evaluate(self.case, self.called)
        elif kind == "thaw":
            for parameter in self.model.parameters():
                parameter.requires_grad_(True)

    def finish(self, curve: Curve) -> None:
        """What is compared after the last step."""
        whole = self.model if self.engine is None else self.engine
        curve.replicas = replica_difference(whole)
        curve.weights = deepspeed_autotp.full_state_dict(whole)
        curve.evaluated = evaluate(self.case, self.called)
        if self.engine is not None:
            self.engine.destroy()


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


def gradients(model: nn.Module, *, zero: int = 0) -> Gradients:
    """The full gradients, on every rank."""
    from deepspeed.utils import safe_get_full_grad

    state = deepspeed_autotp.tensor_parallel(model)
    entries = {entry.name: entry for entry in state.plan.entries}
    found = {}
    for name, parameter in model.named_parameters():
        grad = safe_get_full_grad(parameter) if zero else parameter.grad
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        if not parameter.requires_grad or grad is None:
            continue
        entry = entries.get(name)
        is_full = entry is None or entry.dim < 0
        found[name] = grad.clone() if is_full else state.gather(grad, entry=entry)
    return found


def take_masks(model: nn.Module) -> Masks:
    """The masks of all dropouts since the last call."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            found[name] = list(module.seen)
            module.seen.clear()
    return found


def full_masks(case: Case, model: nn.Module, own: list[Masks]) -> list[Mapping[str, list[Tensor]]]:
    """The masks of one process, from those of all ranks; of a recomputation there are two."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    dropouts = {n: m for n, m in model.named_modules() if isinstance(m, Dropout)}
    rows = case.rows // case.accumulate
    return [
        {
            name: [
                joined(name, each, [rank[step][name][call] for rank in ranks], rows)
                for call in first_calls(case, len(own[step][name]))
            ]
            for name, each in dropouts.items()
        }
        for step in range(len(own))
    ]


def first_calls(case: Case, calls: int) -> list[int]:
    """Which of the calls of a step are not those of a recomputation."""
    micro = calls // case.accumulate
    first = micro // 2 if case.checkpointing else micro
    return [begin + call for begin in range(0, calls, micro or 1) for call in range(first)]


def joined(name: str, dropout: Dropout, masks: list[Tensor], rows: int) -> Tensor:
    tokens_alone = dropout.dim == 1 and masks[0].dim() == 3 and masks[0].shape[0] != rows
    if not tokens_alone and masks[0].shape[dropout.dim] == dropout.size:
        assert all(torch.equal(mask, masks[0]) for mask in masks), f"{name} differs over ranks"
        return masks[0]
    full = torch.cat(masks, dropout.dim)
    return full.unflatten(1, (rows, -1)).squeeze(0) if tokens_alone else full


def train_sharded(case: Case, dtype: torch.dtype) -> tuple[Curve, list[Any], float]:
    """What three steps give, the masks of dropout, and the share of the parameters of a rank."""
    run, curve = Sharded(case, dtype, tp=case.tp), Curve()
    share = held(run.model) / sum(p.numel() for p in make(case, dtype).parameters())
    if not case.resume:
        run.train(curve)
    else:
        run.train(curve, last=STEPS - 1)
        state = deepspeed_autotp.checkpoint_state(run.model, run.optimizer)
        folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [""]
        dist.broadcast_object_list(folder)
        dcp.save(state, checkpoint_id=folder[0])
        masks = run.masks
        run = Sharded(case, dtype, tp=2)
        dcp.load(
            deepspeed_autotp.checkpoint_state(run.model, run.optimizer), checkpoint_id=folder[0]
        )
        run.train(curve, first=STEPS - 1)
        run.masks = masks + run.masks
    run.finish(curve)
    masks = full_masks(case, run.model, run.masks) if case.dropout else []
    return curve, masks, share


def held(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
