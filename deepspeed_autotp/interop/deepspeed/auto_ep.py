# SPDX-License-Identifier: Apache-2.0
"""AutoEP, DeepSpeed's expert parallelism: the blocks that it replaces, and what it makes of them.

Its engine replaces mixture-of-experts blocks before it looks at a sharded model. A block has then a
router and shared experts, which are the same on all ranks of a TP group or sharded as before, and
of all experts those of one rank of an expert-parallel group: consecutive ranks, which may be of
several TP groups.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp._core import nearest
from deepspeed_autotp.interop.deepspeed.auto_ep_blocks import refuse_unlike_blocks
from deepspeed_autotp.interop.deepspeed.parameters import full_shape
from deepspeed_autotp.interop.replaced import Replaced, put_method
from deepspeed_autotp.interop.versions import required

_required = functools.partial(required, project="deepspeed", needed_for="expert_parallel")

# What AutoEP calls the parts of a block, and the tensors of its experts.
_ROUTER, _EXPERTS = "router", "experts"
_GATE, _DOWN, _UP = "w1", "w2", "w3"


@dataclass(frozen=True, slots=True)
class ExpertBlock:
    """A block that AutoEP replaces, by the names of the model of transformers.

    ``router`` and ``experts`` are modules in it. ``parts`` has the names within the block that
    AutoEP gives other ones, by these; ``joined`` has the names of the tensors of the experts that
    AutoEP keeps in pieces (gate and up features, output features), and ``transposed`` says that
    their last two dimensions are in the other order there.
    """

    name: str
    router: str
    experts: str
    parts: Mapping[str, str]
    joined: Mapping[str, tuple[str, ...]]
    transposed: bool


@dataclass(frozen=True, slots=True)
class AutoEPOptions:
    """What of a configuration with AutoEP decides whether it goes beside tensor parallelism.
    ``false_keys`` of zero_optimization are false, which DeepSpeed needs for experts;
    ``wide_gradients`` says that those of bfloat16 weights are summed in float32."""

    stage: int
    comm_backend: str
    score_apply: str
    loads_universal: bool
    false_keys: tuple[str, ...]
    wide_gradients: bool


def unknown_keys(section: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Of the keys of ``expert_parallel`` those that DeepSpeed passes over, with the near ones."""
    config = importlib.import_module("deepspeed.module_inject.auto_ep_config")
    names = [each.name for each in dataclasses.fields(_required(config, "AutoEPConfig"))]
    known = [name for name in names if not name.startswith("_")]
    return {str(key): nearest(str(key), known) for key in section if key not in known}


def auto_ep_options(checked: Any) -> AutoEPOptions | None:
    """Those of DeepSpeed's configuration ``checked``; None where AutoEP is not on."""
    asked, zero = checked.expert_parallel_config, checked.zero_config
    if asked is None or not asked.enabled:
        return None
    stage = int(zero.stage)
    needed = ("reduce_scatter", "contiguous_gradients") if stage > 0 else ()
    return AutoEPOptions(
        stage=stage,
        comm_backend=asked.comm_backend,
        score_apply=asked.score_apply,
        loads_universal=bool(checked.load_universal_checkpoint),
        false_keys=tuple(key for key in needed if not getattr(zero, key)),
        wide_gradients=checked.bfloat16_config.enabled and _sums_in_float32(checked),
    )


def _sums_in_float32(checked: Any) -> bool:
    kinds = _required(importlib.import_module("deepspeed.runtime.config"), "DtypeEnum")
    given = checked.grad_accum_dtype
    return given is not None and kinds(given).value == torch.float32


def find_expert_blocks(
    model: nn.Module, checked: Any, *, tp_size: int, ranks: int
) -> tuple[ExpertBlock, ...]:
    """The blocks that AutoEP of DeepSpeed's configuration ``checked`` replaces in ``model``.

    ValueError for whatever AutoEP refuses, which it does in the engine, after the model is sharded.
    """
    config = importlib.import_module("deepspeed.module_inject.auto_ep_config")
    parser = importlib.import_module("deepspeed.module_inject.auto_ep")
    asked = checked.expert_parallel_config
    zero = checked.zero_config
    _required(config, "validate_autoep_config")(
        asked,
        ranks,
        1,
        tp_size,
        1,
        zero_stage=int(zero.stage),
        tp_preset_model=checked.tensor_parallel_config.preset_model,
        use_data_before_expert_parallel=checked.use_data_before_expert_parallel_,
        zero_offload_optimizer=zero.offload_optimizer is not None,
        zero_offload_param=zero.offload_param is not None,
    )
    found = _required(parser, "AutoEP")(model, asked).ep_parser()
    _required(config, "validate_autoep_post_detection")(asked, found)
    blocks = tuple(_block(model, each) for each in found)
    refuse_unlike_blocks(model, found, asked)
    return blocks


def _block(model: nn.Module, spec: Any) -> ExpertBlock:
    if spec.expert_storage != "fused_3d":
        raise ValueError(
            f"got '{spec.moe_module_name}.{spec.experts_name}', a list of modules, expected "
            "experts that are one tensor for each of their layers"
        )
    parts = {f"{_ROUTER}.gate": spec.router_name}
    if spec.e_score_correction_bias_path is not None:
        owner = spec.e_score_correction_bias_path
        bias = "e_score_correction_bias"
        parts[f"{_ROUTER}.{bias}"] = f"{owner}.{bias}" if owner else bias
    if spec.has_shared_experts:
        parts["shared_experts"] = spec.shared_experts_name
    if spec.shared_experts_gate_name:
        parts["shared_experts_gate"] = spec.shared_experts_gate_name
    experts = spec.experts_name
    gate_and_up: dict[str, tuple[str, ...]] = (
        {f"{experts}.{spec.expert_w1_name}": (_GATE, _UP)}
        if spec.expert_w3_name is None
        else {
            f"{experts}.{spec.expert_w1_name}": (_GATE,),
            f"{experts}.{spec.expert_w3_name}": (_UP,),
        }
    )
    return ExpertBlock(
        name=spec.moe_module_name,
        router=spec.router_name,
        experts=experts,
        parts=parts,
        joined={**gate_and_up, f"{experts}.{spec.expert_w2_name}": (_DOWN,)},
        transposed=_is_transposed(model, spec),
    )


def _is_transposed(model: nn.Module, spec: Any) -> bool:
    if spec.expert_w3_name is not None:
        return False
    layouts = importlib.import_module("deepspeed.moe.fused_expert_layout")
    module = model.get_submodule(f"{spec.moe_module_name}.{spec.experts_name}")
    shapes = [
        full_shape(module.get_parameter(name))
        for name in (spec.expert_w1_name, spec.expert_w2_name)
    ]
    return bool(_required(layouts, "classify_fused_gate_up_layout")(*shapes).needs_transpose)


@contextmanager
def starting_auto_ep() -> Iterator[None]:
    """A context in which AutoEP starts with transformers 5.23 and later.

    It asks transformers' registry of recorded outputs, a dictionary by the text of a class, by such
    a text and with a default, and writes to it by the text. Since transformers 5.23 the registry
    makes the text of the model that it is given, and takes nothing else.
    """
    capturing = importlib.import_module("transformers.utils.output_capturing")
    name = "_CAN_RECORD_REGISTRY"
    kind = type(required(capturing, name, project="transformers", needed_for="expert_parallel"))
    replaced = Replaced()
    if kind is not dict:
        put_method(replaced, kind, "get", _get)
        put_method(replaced, kind, "__setitem__", _set)
    try:
        yield
    finally:
        replaced.restore()


def _get(original: Any, registry: dict[str, Any], key: object, *default: object) -> Any:
    return dict.get(registry, key, *default) if isinstance(key, str) else original(registry, key)


def _set(original: Any, registry: dict[str, Any], key: object, value: Any) -> None:
    if isinstance(key, str):
        dict.__setitem__(registry, key, value)
    else:
        original(registry, key, value)


def leave_uncompiled(model: nn.Module, blocks: Sequence[ExpertBlock]) -> None:
    """Let torch.compile break its graph at the blocks that AutoEP has replaced: compiled, their
    collectives give other gradients, without any error."""
    for block in blocks:
        layer: Any = model.get_submodule(block.name)
        layer.forward = torch.compiler.disable(layer.forward)


def is_expert(parameter: Tensor) -> bool:
    """Whether AutoEP has made the parameter, of experts of one rank of a group."""
    return getattr(parameter, "ds_zero_placement_family", None) == "autoep_expert"


def expert_group(parameter: Tensor) -> dist.ProcessGroup:
    """The ranks that have all experts of ``parameter`` between them."""
    groups = importlib.import_module("deepspeed.utils.groups")
    marked: Any = parameter
    handle: dist.ProcessGroup = _required(groups, "_get_expert_parallel_group")(marked.group_name)
    return handle


def expert_parallel_size(model: nn.Module) -> int:
    """Over how many ranks the experts of ``model`` are split."""
    return dist.get_world_size(expert_group(next(filter(is_expert, model.parameters()))))


def all_experts(parameter: Tensor) -> Tensor:
    """The tensors of all experts, in their order. All ranks of the group call it."""
    group, own = expert_group(parameter), parameter.detach().contiguous()
    pieces = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, own, group=group)
    return torch.cat(pieces)


def joined_experts(block: ExpertBlock, pieces: Sequence[Tensor]) -> Tensor:
    """A tensor of transformers' experts, made of AutoEP's."""
    if block.transposed:
        return torch.cat([piece.transpose(1, 2) for piece in pieces], dim=2)
    return torch.cat(list(pieces), dim=1)
