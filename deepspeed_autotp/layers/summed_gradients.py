# SPDX-License-Identifier: Apache-2.0
"""Modules with parameters of whose gradient each rank computes a part of a sum.

A norm of queries and keys is applied to a rank's own heads, key and value heads that several ranks
hold to a rank's own queries, and with sharded tokens any replicated module to a rank's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp.distributed.gradient_sum import GradientSum, with_summed_gradient
from deepspeed_autotp.interop.fully_shard import is_distributed
from deepspeed_autotp.interop.module_state import state_of
from deepspeed_autotp.interop.torch_private import backward_id, own_parameters, storage_id
from deepspeed_autotp.layers.forward_context import ForwardContext

# By module state and name, of each the parameter.
Views = dict[tuple[int, str], tuple[Tensor, Tensor]]


@dataclass(slots=True)
class SummedParameters:
    """How the gradients of a module's own parameters are summed, by name.

    in_use  what the module's forward has read as these parameters, while it runs outside of that
            of the model, which has what is in use in its context
    """

    sums: Mapping[str, GradientSum]
    context: ForwardContext
    in_use: Views | None = None


class SumsGradients(nn.Module):
    """A module with such parameters, mixed into its class, which has a
    :func:`summed_parameter` for each.

    forward   no communication
    backward  all-reduce of the gradient of each parameter over the ranks that hold it
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Also where the module alone was given another forward, as of a kernel.
        return _while_it_runs(self, super().__call__, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _while_it_runs(self, super().forward, args, kwargs)


def summed_parameter(name: str, inherited: Sequence[object]) -> property:
    """The parameter ``name``, which reads as a view with a gradient that is summed: in the forward
    of its module as one, however often it is read, and also in that of another of the model.

    ``inherited`` is what the module's class and its bases have under the name.
    """
    first = next(iter(inherited), None)
    own = first.fget if isinstance(first, property) else None

    def read(module: nn.Module) -> Tensor | None:
        if name not in own_parameters(module):
            raise AttributeError(name)  # which nn.Module turns into its own message
        parameter = own_parameters(module)[name] if own is None else own(module)
        try:
            return _in_use(module, name, parameter)
        except AttributeError as error:
            # Python would take it for a missing attribute, and ask nn.Module for the parameter.
            raise RuntimeError(f"{name} of {type(module).__name__}: {error}") from error

    return property(read)


def _while_it_runs(
    module: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    state = state_of(module, SummedParameters)
    for name in state.sums:
        if name not in own_parameters(module):
            raise RuntimeError(
                f"{name} of {type(module).__name__} is no parameter of it any more, as after "
                "torch.nn.utils.parametrize, and its gradient would not be summed over the "
                "TP group; change the module before the model is sharded"
            )
    before, state.in_use = state.in_use, {}
    try:
        return run(*args, **kwargs)
    finally:
        state.in_use = before


def _in_use(module: nn.Module, name: str, parameter: Tensor | None) -> Tensor | None:
    if parameter is None or not (parameter.requires_grad and torch.is_grad_enabled()):
        return parameter
    if is_distributed(parameter):  # fully_shard looks in a forward if it is still its own
        return parameter
    state = state_of(module, SummedParameters)
    views = _views(state)
    if views is None:
        is_used = _is_in_forward(state.context)
        return with_summed_gradient(parameter, state.sums[name]) if is_used else parameter
    key = id(state), name
    before, view = views.get(key, (None, None))
    # ZeRO 3 gathers a weight into other memory for each call of a module.
    if view is None or before is not parameter or storage_id(view) != storage_id(parameter):
        view = with_summed_gradient(parameter, state.sums[name])
        views[key] = parameter, view
    return view


def _views(state: SummedParameters) -> Views | None:
    """Those of the model's forward, so that ranks which call a module more often than others sum as
    often; or else of the module's own."""
    if not torch.compiler.is_compiling() and state.context.is_in_forward:
        return state.context.summed
    return state.in_use


def _is_in_forward(context: ForwardContext) -> bool:
    if torch.compiler.is_compiling():
        return context.is_in_forward
    # Also a checkpointed part that runs again.
    return context.is_in_forward_of_part or backward_id() >= 0
