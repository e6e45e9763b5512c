# SPDX-License-Identifier: Apache-2.0
"""The full gradients of a sharded model, each of whose parameters has one."""

from torch import Tensor, nn

import deepspeed_autotp


def gathered_gradients(model: nn.Module) -> dict[str, Tensor]:
    state = deepspeed_autotp.tensor_parallel(model)
    found = {}
    for name, parameter in model.named_parameters():
        entry = state.entry(parameter)
        assert entry is not None and parameter.grad is not None, name
        found[name] = parameter.grad if entry.dim < 0 else state.gather(parameter.grad, entry=entry)
    return found
