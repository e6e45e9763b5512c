# SPDX-License-Identifier: Apache-2.0
"""The gradient norm that DeepSpeed's optimizers clip by and report.

DeepSpeed counts a parameter on TP rank 0, and on the others where it has the attribute
``tensor_model_parallel``. DeepSpeed 0.19.8 does so wrongly or not at all in the places that are
replaced here, on the optimizer of one engine: ZeRO 0 reads the attribute from gradients, which
have none, or reports no norm; BF16_Optimizer fails where a rank counts no gradient; and all count
a fused weight in full or not at all, though a rank may be the lowest to hold a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed_autotp.interop.deepspeed.auto_ep import is_expert
from deepspeed_autotp.interop.deepspeed.module import has_moe_layers, versions


class GradNorm(Protocol):
    """What is known of the gradients of a sharded model; state/grad_norm.py has it."""

    def counted(self, gradient: Tensor, parameter: Tensor, *, first: int = 0) -> Tensor: ...

    def is_partly_counted(self, parameter: Tensor) -> bool: ...

    def of(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor: ...


def count_weights_once(engine: Any, norm: GradNorm, *, clip: Callable[[float], Tensor]) -> None:
    """Let the gradient norm of ``engine`` count each weight once.

    ``clip(most)`` clips the gradients of the model and returns their norm. ValueError for an
    optimizer of DeepSpeed whose norm is not known.
    """
    optimizer = engine.optimizer
    name = type(optimizer).__name__
    if optimizer is None or name in _WITHOUT_STEP:
        return
    if has_moe_layers(engine.module):
        raise ValueError(
            "initialize: the model has deepspeed.moe layers, whose gradient norm is not known with "
            "tensor parallelism; train it without tensor_parallel"
        )
    if isinstance(optimizer, torch.optim.Optimizer):
        _clip_plain(engine, clip)
        return
    found = _SEAMS.get(name)
    missing = () if found is None else [a for a in found.attributes if not hasattr(optimizer, a)]
    if found is None or missing:
        raise ValueError(
            f"initialize: the gradient norm of DeepSpeed's {name} is not known under tensor "
            f"parallelism{', without its ' + ', '.join(missing) if missing else ''}: "
            f"{versions()}; use ZeRO stage 0 to 3 "
            "without ZenFlow and SuperOffload"
        )
    found.replace(engine, norm)


# Engines without an optimizer have these in its place.
_WITHOUT_STEP = frozenset({"DummyOptim", "DeepSpeedZeRoOffload"})


def _clip_plain(engine: Any, clip: Callable[[float], Tensor]) -> None:
    """ZeRO 0 in float32: the gradients are those of the parameters."""

    def clip_fp32_gradients() -> None:
        engine._global_grad_norm = clip(engine.gradient_clipping())

    engine.clip_fp32_gradients = clip_fp32_gradients


def _in_unfused(engine: Any, norm: GradNorm) -> None:
    """ZeRO 0 in bfloat16: replaced where the optimizer is about to clip its float32 gradients."""
    optimizer = engine.optimizer
    scale = optimizer.unscale_and_clip_grads

    def unscale_and_clip_grads(total_norm: float, apply_scale: bool = True) -> Any:
        pairs = [
            (parameter, master.grad)
            for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for parameter, master in zip(group, masters, strict=True)
        ]
        optimizer._global_grad_norm = float(norm.of(pairs))
        return scale(optimizer._global_grad_norm, apply_scale)

    optimizer.unscale_and_clip_grads = unscale_and_clip_grads


def _in_fused(engine: Any, norm: GradNorm) -> None:
    """The same for FusedAdam, whose gradients are one flat tensor for each group."""
    optimizer = engine.optimizer
    scale = optimizer.unscale_and_clip_grads

    def unscale_and_clip_grads(
        grad_groups_flat: Sequence[Tensor], total_norm: float, apply_scale: bool = True
    ) -> Any:
        pairs = [
            (parameter, gradient)
            for group, flat in zip(optimizer.fp16_groups, grad_groups_flat, strict=True)
            for parameter, gradient in zip(
                group, flat.split([p.numel() for p in group]), strict=True
            )
        ]
        optimizer._global_grad_norm = float(norm.of(pairs))
        return scale(grad_groups_flat, optimizer._global_grad_norm, apply_scale)

    optimizer.unscale_and_clip_grads = unscale_and_clip_grads


def _in_bf16(engine: Any, norm: GradNorm) -> None:
    """ZeRO 1 in bfloat16 with float32 gradients: the list of what this rank counts."""
    optimizer = engine.optimizer
    grads = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        if for_clipping:
            return grads(for_clipping=True)
        counted = [
            norm.counted(gradient, parameter)
            for group, gradients, has in zip(
                optimizer.bf16_groups,
                optimizer.fp32_groups_gradients,
                optimizer.fp32_groups_has_gradients,
                strict=True,
            )
            for parameter, gradient, there in zip(group, gradients, has, strict=True)
            if there
        ]
        # DeepSpeed cannot stack the norms of an empty list.
        return [*counted, torch.zeros(1, device=engine.device)], {}

    optimizer.get_grads_for_norm = get_grads_for_norm


def _in_zero_1_and_2(engine: Any, norm: GradNorm) -> None:
    optimizer = engine.optimizer

    def counted(gradients: Any, params: Any) -> list[Tensor]:
        group = next(i for i, own in enumerate(optimizer.params_in_partition) if own is params)
        rank = dist.get_rank(optimizer.real_dp_process_group[group])
        starts = optimizer.grad_start_offset[group][rank]
        filled = [g for g in gradients if not getattr(g, "_zero_padding", False)]
        return [
            norm.counted(gradient, p, first=starts[optimizer.get_param_id(p)])
            for gradient, p in zip(filled, params, strict=False)  # padding may follow
        ]

    if engine.has_moe_layers:
        _count_experts(optimizer)
    if _has_partly_counted(engine, optimizer.bit16_groups, norm):
        _count_in_direct_norm(optimizer, counted)


@dataclass(frozen=True, slots=True)
class _OnEachRank:
    """What DeepSpeed's norm reads of a parameter that each rank has a part of for itself."""

    tensor_model_parallel: bool = True


def _count_experts(optimizer: Any) -> None:
    """Let ZeRO count the experts of every rank: DeepSpeed 0.19.8 counts those of TP rank 0."""
    direct = optimizer.get_grad_norm_direct

    def get_grad_norm_direct(gradients: Any, params: Any, norm_type: float = 2) -> Any:
        if any(map(is_expert, params)):
            params = [_OnEachRank()] * len(params)
        return direct(gradients, params, norm_type)

    optimizer.get_grad_norm_direct = get_grad_norm_direct


def _in_zero_3(engine: Any, norm: GradNorm) -> None:
    optimizer = engine.optimizer

    def counted(gradients: Any, params: Any) -> list[Tensor]:
        rank = dist.get_rank(optimizer.dp_process_group)
        return [
            norm.counted(gradient, p, first=rank * p.partition_numel())
            for gradient, p in zip(gradients, params, strict=True)
        ]

    if _has_partly_counted(engine, optimizer.fp16_groups, norm):
        _count_in_direct_norm(optimizer, counted)


def _count_in_direct_norm(optimizer: Any, counted: Callable[[Any, Any], list[Tensor]]) -> None:
    """Let ZeRO form its norm of what ``counted(gradients, params)`` leaves of the gradients."""
    direct = optimizer.get_grad_norm_direct

    def get_grad_norm_direct(gradients: Any, params: Any, norm_type: float = 2) -> Any:
        return direct(counted(gradients, params), params, norm_type)

    optimizer.get_grad_norm_direct = get_grad_norm_direct


def _has_partly_counted(engine: Any, groups: Iterable[Iterable[Tensor]], norm: GradNorm) -> bool:
    """Whether a trained parameter is one. ValueError where its optimizer state is offloaded:
    DeepSpeed forms the norms of such gradients on the way."""
    found = next((p for group in groups for p in group if norm.is_partly_counted(p)), None)
    if found is not None and engine.zero_use_cpu_optimizer():
        raise ValueError(
            "initialize: zero_optimization.offload_optimizer: several ranks hold the key/value "
            f"heads of {engine.param_names[found]}, a fused weight, and DeepSpeed would "
            "count them several times or not at all in the gradient norm; leave offload_optimizer "
            "out, or use a TP size that is at most the number of key/value heads"
        )
    return found is not None


@dataclass(frozen=True, slots=True)
class _Seam:
    """How the norm of one optimizer is replaced, and the attributes that this needs."""

    replace: Callable[[Any, GradNorm], None]
    attributes: tuple[str, ...]


_SEAMS = {
    "FP16_UnfusedOptimizer": _Seam(
        _in_unfused, ("unscale_and_clip_grads", "fp16_groups", "fp32_groups")
    ),
    "FP16_Optimizer": _Seam(_in_fused, ("unscale_and_clip_grads", "fp16_groups")),
    "BF16_Optimizer": _Seam(
        _in_bf16,
        (
            "get_grads_for_norm",
            "bf16_groups",
            "fp32_groups_gradients",
            "fp32_groups_has_gradients",
        ),
    ),
    "DeepSpeedZeroOptimizer": _Seam(
        _in_zero_1_and_2,
        ("get_grad_norm_direct", "params_in_partition", "grad_start_offset", "bit16_groups"),
    ),
    "DeepSpeedZeroOptimizer_Stage3": _Seam(
        _in_zero_3, ("get_grad_norm_direct", "dp_process_group", "fp16_groups")
    ),
}
