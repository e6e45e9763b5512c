# SPDX-License-Identifier: Apache-2.0
"""The weights of a model whose experts DeepSpeed's AutoEP has split, by their names of before.

AutoEP calls the router otherwise, and keeps gate and up features apart, those of some experts on
each rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deepspeed_autotp.interop.deepspeed.auto_ep import (
    ExpertBlock,
    all_experts,
    is_expert,
    joined_experts,
)
from deepspeed_autotp.state.sharded_model import TensorParallel

_INSTEAD = "call full_state_dict, or save_16bit_model of the engine, for full weights"


@dataclass(frozen=True, slots=True)
class Experts:
    """A tensor of experts of the unsharded model, which AutoEP keeps in ``pieces``."""

    block: ExpertBlock
    pieces: tuple[Tensor, ...]

    @property
    def trains(self) -> bool:
        return any(piece.requires_grad for piece in self.pieces)

    def full(self) -> Tensor:
        """That of all experts, on the CPU. All ranks of the run call it."""
        joined = joined_experts(self.block, [all_experts(piece) for piece in self.pieces])
        return joined.to("cpu")


def named_as_before(state: TensorParallel | None, found: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict ``found`` of a model by the names of before AutoEP replaced blocks."""
    blocks = () if state is None else state.expert_blocks
    result: dict[str, Any] = {}
    for name, value in found.items():
        block = next((each for each in blocks if name.startswith(f"{each.name}.")), None)
        if block is None:
            result[name] = value
            continue
        within = name.removeprefix(f"{block.name}.")
        piece = within.removeprefix("experts.")
        if piece != within:
            for own, pieces in block.joined.items():
                if pieces[0] == piece:
                    tensors = tuple(found[f"{block.name}.experts.{each}"] for each in pieces)
                    result[f"{block.name}.{own}"] = Experts(block, tensors)
        elif before := _before(block, within):
            result[f"{block.name}.{before}"] = value
    return result


def _before(block: ExpertBlock, name: str) -> str | None:
    """What a tensor of AutoEP's block was called; None for its router under a second name."""
    for now, before in block.parts.items():
        if name == now or name.startswith(f"{now}."):
            return before + name.removeprefix(now)
    return None if name.startswith(f"{block.router}.") else name


def refuse_experts(called: str, state: TensorParallel | None, model: nn.Module) -> None:
    """ValueError for ``called``, which knows nothing of experts that AutoEP has split."""
    if state is not None and state.expert_blocks:
        raise ValueError(
            f"{called}: got a {type(model).__name__} with experts that DeepSpeed's AutoEP has "
            f"split, expected shards of the TP group alone; {_INSTEAD}"
        )


def refuse_expert_parameters(called: str, parameters: list[Tensor]) -> None:
    """The same for parameters."""
    if any(map(is_expert, parameters)):
        raise ValueError(
            f"{called}: got parameters of experts that DeepSpeed's AutoEP has split, expected "
            f"shards of the TP group alone; {_INSTEAD}"
        )
