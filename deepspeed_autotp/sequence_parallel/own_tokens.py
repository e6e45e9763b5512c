# SPDX-License-Identifier: Apache-2.0
"""A norm between the last layer of a stack and the output head, on this rank's own tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from deepspeed_autotp.distributed.autograd_collectives import copy_to_tp_region
from deepspeed_autotp.distributed.lazy_sequence import gather_later, own_tokens
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.interop.torch_private import own_parameters


class NormOfOwnTokens(nn.Module):
    """Mixed into the class of a norm, which takes tokens one by one.

    x  [N, H]   a LazySequence, of which the norm's own forward is given the shard; or a tensor
    y  [N, H]   as x

    backward  an all-reduce of the gradient of each parameter, in float32
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        lazy = own_tokens(x)
        if lazy is None:
            return super().forward(x, *args, **kwargs)
        with _summed_gradients(self, lazy.group):
            y = super().forward(lazy.shard, *args, **kwargs)
        return gather_later(y, lazy.layout_of_shard, lazy.group)


@contextmanager
def _summed_gradients(module: nn.Module, group: TPGroup) -> Iterator[None]:
    """A context in which the parameters of ``module`` have the sum of all ranks' gradients."""
    parameters = cast(dict[str, Any], own_parameters(module))
    before = dict(parameters)
    try:
        for name, parameter in before.items():
            if parameter is not None:
                wide = parameter.float() if parameter.dtype.itemsize == 2 else parameter
                parameters[name] = copy_to_tp_region(wide, group).to(parameter.dtype)
        yield
    finally:
        parameters.update(before)
