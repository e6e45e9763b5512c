# SPDX-License-Identifier: Apache-2.0
"""TRL's generation by vLLM under tensor parallelism: which weights it sends, and which answers the
ranks of a TP group work with."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp.interop.accelerate_replicas import of_ranks, tp_size
from deepspeed_autotp.interop.deepspeed.groups import engine_group
from deepspeed_autotp.interop.replaced import Replaced, put_method
from deepspeed_autotp.interop.versions import required

_MODULE, _CLASS = "trl.generation.vllm_generation", "VLLMGeneration"
# Those that generate by it.
_CONFIGS = (
    *("trl.trainer.grpo_config", "trl.trainer.rloo_config", "trl.trainer.distillation_config"),
    *("trl.experimental.gold.gold_config", "trl.experimental.iw_opd.iw_opd_config"),
    *("trl.experimental.sdft.sdft_config", "trl.experimental.sdpo.sdpo_config"),
)

# Name and full tensor of each parameter of a model, or None for one that is not sharded.
FullParameters = Callable[[nn.Module], Iterator[tuple[str, Tensor]] | None]


def send_full_weights(replaced: Replaced, full_parameters: FullParameters) -> None:
    """Let TRL, where it was imported, send full weights to vLLM, and take equal answers from it."""
    if not any(name in sys.modules for name in _CONFIGS):
        return
    cls = getattr(importlib.import_module(_MODULE), _CLASS)
    for name, ours in (
        ("_iter_named_params", functools.partial(_named_params, full_parameters)),
        ("_init_vllm", _init_vllm),
        ("generate", _generate),
    ):
        required(cls, name, project="trl", needed_for="install()")
        put_method(replaced, cls, name, ours)


def _named_params(
    full_parameters: FullParameters, original: Callable[..., Any], generation: Any
) -> Iterator[tuple[str, Tensor]]:
    model = generation.model
    found = full_parameters(model)
    if found is None:
        yield from original(generation)
        return
    prefix = getattr(model, "prefix", None)  # of PEFT's own parameters
    try:
        if prefix is not None:
            model.merge_adapter()
        for name, tensor in found:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if prefix is None or not (prefix in plain or "original_module" in plain):
                saved = [] if prefix is None else ["modules_to_save.default."]
                yield generation._fix_param_name_to_vllm(plain, extra_prefixes=saved), tensor
    finally:
        if prefix is not None:
            model.unmerge_adapter()


def _init_vllm(original: Callable[..., Any], generation: Any) -> None:
    # An engine in each process is one of vLLM's ranks.
    start = of_ranks(original) if generation.mode == "colocate" else original
    start(generation)


def _generate(original: Callable[..., Any], generation: Any, *args: Any, **kwargs: Any) -> Any:
    size = tp_size()
    if size == 1 or generation.mode != "colocate":
        return original(generation, *args, **kwargs)
    answers = [of_ranks(original)(generation, *args, **kwargs)]
    # Every rank has drawn its own.
    group = engine_group(tp_size=size)
    dist.broadcast_object_list(answers, src=dist.get_global_rank(group, 0), group=group)
    return answers[0]
