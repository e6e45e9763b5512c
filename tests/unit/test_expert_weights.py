# SPDX-License-Identifier: Apache-2.0
"""Tensors of experts that AutoEP has split, put together again, and their names of before."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.moe.ep_repack import repack_expert_weights
from torch import nn

from deepspeed_autotp.checkpoint.expert_weights import Experts, named_as_before
from deepspeed_autotp.interop.deepspeed.auto_ep import ExpertBlock, joined_experts

EXPERTS, HIDDEN, FEATURES = 4, 6, 10
# By layout: the shapes of one expert's tensors in transformers, and what they are made of.
LAYOUTS = {
    "gate and up first": ({"gate_up": (2 * FEATURES, HIDDEN), "down": (HIDDEN, FEATURES)}, False),
    "hidden first": ({"gate_up": (HIDDEN, 2 * FEATURES), "down": (FEATURES, HIDDEN)}, True),
    "apart": (
        {"gate": (FEATURES, HIDDEN), "up": (FEATURES, HIDDEN), "down": (HIDDEN, FEATURES)},
        False,
    ),
}
PIECES = {"gate_up": ("w1", "w3"), "gate": ("w1",), "up": ("w3",), "down": ("w2",)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_experts_of_all_ranks_are_the_tensors_of_before(layout: str, ranks: int) -> None:
    shapes, transposed = LAYOUTS[layout]
    source = nn.Module()
    for name, shape in shapes.items():
        source.register_parameter(name, nn.Parameter(torch.randn(EXPERTS, *shape)))
    spec = SimpleNamespace(
        num_experts=EXPERTS,
        expert_storage="fused_3d",
        expert_w1_name=next(iter(shapes)),
        expert_w2_name="down",
        expert_w3_name="up" if "up" in shapes else None,
    )
    split = [repack_expert_weights(source, spec, rank, ranks) for rank in range(ranks)]
    whole = {f"w{i + 1}": torch.cat([each[i] for each in split]) for i in range(3)}
    block = ExpertBlock("mlp", "gate", "experts", {}, {}, transposed)
    for name, parameter in source.named_parameters():
        made = joined_experts(block, [whole[piece] for piece in PIECES[name]])
        assert torch.equal(made, parameter), name


def test_tensors_have_the_names_of_before() -> None:
    parts = {
        "router.gate": "gate",
        "router.e_score_correction_bias": "gate.e_score_correction_bias",
        "shared_experts": "shared_expert",
        "shared_experts_gate": "shared_expert_gate",
    }
    joined = {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)}
    block = ExpertBlock("layers.1.mlp", "gate", "experts", parts, joined, False)
    names = {
        "layers.0.mlp.gate.weight": "layers.0.mlp.gate.weight",  # of a dense layer
        "layers.1.mlp.router.gate.weight": "layers.1.mlp.gate.weight",
        "layers.1.mlp.router.e_score_correction_bias": "layers.1.mlp.gate.e_score_correction_bias",
        "layers.1.mlp.gate.gate.weight": None,  # the router under its second name
        "layers.1.mlp.experts.w1": "layers.1.mlp.experts.gate_up_proj",
        "layers.1.mlp.experts.w2": "layers.1.mlp.experts.down_proj",
        "layers.1.mlp.experts.w3": None,
        "layers.1.mlp.shared_experts.up_proj.weight": "layers.1.mlp.shared_expert.up_proj.weight",
        "layers.1.mlp.shared_experts_gate.weight": "layers.1.mlp.shared_expert_gate.weight",
        "layers.10.mlp.gate.weight": "layers.10.mlp.gate.weight",
    }
    tensors = {name: torch.zeros(1) for name in names}
    state = SimpleNamespace(expert_blocks=(block,))
    found = named_as_before(state, tensors)  # type: ignore[arg-type]
    assert list(found) == [name for name in names.values() if name is not None]
    assert isinstance(found["layers.1.mlp.experts.gate_up_proj"], Experts)
    assert found["layers.1.mlp.experts.gate_up_proj"].pieces == (
        tensors["layers.1.mlp.experts.w1"],
        tensors["layers.1.mlp.experts.w3"],
    )
    assert named_as_before(None, tensors) == tensors
