# SPDX-License-Identifier: Apache-2.0
"""What wraps a model, as DeepSpeed's engine, DDP and torch.compile do, or a module in it, as
torch.compile and torch's activation checkpointing do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from deepspeed_autotp.interop.torch_private import submodules

# What torch's wrappers put into the names of what is in a module.
_OF_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def without_wrappers(name: str) -> str:
    """The name that a tensor has where no module around it is wrapped."""
    for part in _OF_WRAPPERS:
        name = name.replace(part, "")
    return name


def all_named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every name of every parameter, as without wrappers around modules of ``model``."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield without_wrappers(name), parameter


def refuse_wrapped(model: nn.Module) -> None:
    """ValueError for a model that others have wrapped, or modules of it: names and parameters would
    be those of the wrappers."""
    for name, module in model.named_modules():
        where = name or "the model"
        if "_orig_mod" in submodules(module):
            raise ValueError(
                f"{where} is compiled already; shard the model first, then call torch.compile"
            )
        if "_checkpoint_wrapped_module" in submodules(module):
            raise ValueError(
                f"{where} is in a wrapper for activation checkpointing already; shard the model "
                "first, then call apply_activation_checkpointing"
            )
        if isinstance(module, nn.parallel.DistributedDataParallel) or _is_fsdp1(module):
            raise ValueError(
                f"{where} is in {type(module).__name__} already; call parallelize first, then "
                "DistributedDataParallel or fully_shard over data-parallel ranks"
            )


def _is_fsdp1(module: nn.Module) -> bool:
    """Whether ``module`` is a FullyShardedDataParallel, whose import takes long."""
    return "_fsdp_wrapped_module" in submodules(module)


def unwrapped(engine_or_model: Any) -> Iterator[nn.Module]:
    """``engine_or_model`` and, from the outside in, the modules it wraps."""
    inner = engine_or_model
    while isinstance(inner, nn.Module):
        yield inner
        inner = submodules(inner).get("_orig_mod") or getattr(inner, "module", None)
