# SPDX-License-Identifier: Apache-2.0
"""What is read under private names of torch is what the public functions put there."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from deepspeed_autotp.interop.torch_private import is_hooked


@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    ],
)
def test_hooks_are_seen_until_they_are_removed(register: Callable[..., Any]) -> None:
    module = nn.Linear(2, 2)
    assert not is_hooked(module)
    hook = register(module, lambda *args: None)
    assert is_hooked(module)
    hook.remove()
    assert not is_hooked(module)
