# SPDX-License-Identifier: Apache-2.0
"""What ``save_16bit_model`` and ``Trainer.save_model`` write: full weights, not shards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def save_full_weights(
    engine: Any,
    *,
    full_state: Callable[[bool], dict[str, Tensor] | None],
    replaced: Callable[[Path], AbstractContextManager[Path]],
    leaves_out: bool,
) -> None:
    """Let ``engine`` write full weights wherever it writes a model without its optimizer.

    ``full_state(frozen)`` is the state dict on rank 0 and None elsewhere. Without it DeepSpeed
    0.19.8 writes the shards of rank 0 in ``save_16bit_model`` unless ZeRO 3 is on, and omits the
    buffers in what ``Trainer.save_model`` takes. ``replaced(file)`` gives a name to write in place
    of that of ``file``, so that a crash leaves the file that was there. ``leaves_out``: it omits
    some weights, which DeepSpeed would gather under ZeRO 3.
    """
    _replace_states(engine, full_state, replaced)
    engine._replace_module_consolidated_state_dict = lambda: full_state(True)
    if leaves_out:

        def consolidated(exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
            return full_state(not exclude_frozen_parameters)

        engine._zero3_consolidated_16bit_state_dict = consolidated


def save_gathered_weights(
    engine: Any, *, replaced: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    """As :func:`save_full_weights` where layers of DeepSpeed's own have shards, and nothing else.

    They gather them themselves; DeepSpeed 0.19.8 omits the buffers, and ``save_16bit_model`` asks
    them under ZeRO 3 only.
    """
    consolidated = engine._consolidated_16bit_state_dict
    by_layers = engine._replace_module_consolidated_state_dict

    def with_buffers(state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        kept = engine.module.state_dict(keep_vars=True)
        if state is None:
            return None
        buffers = {
            name: tensor.detach().cpu()
            for name, tensor in kept.items()
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter)
        }
        found = {**state, **buffers}
        return {name: found[name] for name in kept if name in found}

    def full_state(frozen: bool) -> dict[str, Tensor] | None:
        state = with_buffers(consolidated())
        if state is None or frozen:
            return state
        left = {name for name, p in engine.module.named_parameters() if not p.requires_grad}
        return {name: tensor for name, tensor in state.items() if name not in left}

    _replace_states(engine, full_state, replaced)
    engine._replace_module_consolidated_state_dict = lambda: with_buffers(by_layers())


def _replace_states(
    engine: Any,
    full_state: Callable[[bool], dict[str, Tensor] | None],
    replaced: Callable[[Path], AbstractContextManager[Path]],
) -> None:
    save = engine.save_16bit_model

    def save_16bit_model(
        save_dir: str,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        engine.module_state_dict = lambda **_: full_state(not exclude_frozen_parameters)
        try:
            # Others than this write after they have returned.
            if type(engine.checkpoint_engine).__name__ != "TorchCheckpointEngine":
                return bool(save(save_dir, save_filename, exclude_frozen_parameters))
            with replaced(Path(save_dir, save_filename)) as written:
                name = str(written.relative_to(save_dir))
                return bool(save(save_dir, name, exclude_frozen_parameters))
        finally:
            del engine.module_state_dict

    engine.save_16bit_model = save_16bit_model
