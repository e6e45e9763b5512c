# SPDX-License-Identifier: Apache-2.0
"""Who asks for a ``state_dict``: torch.distributed.checkpoint, or other code."""

from __future__ import annotations

import inspect

_TORCH = "torch.distributed.checkpoint"
_OWN = "deepspeed_autotp.checkpoint."


def asked_by_distributed_checkpoint() -> bool:
    """Whether torch.distributed.checkpoint is running, and not through what this package gives it:
    for the hook of a ``state_dict`` that calls this.

    Its ``save``, ``load`` and ``get_model_state_dict`` call the ``state_dict`` of a model.
    """
    hook = getattr(inspect.currentframe(), "f_back", None)
    frame = None if hook is None else hook.f_back
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith(_OWN):
            return False
        if name.startswith(_TORCH):
            return True
        frame = frame.f_back
    return False
