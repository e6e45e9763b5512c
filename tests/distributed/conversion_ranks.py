# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_conversion.py do."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from deepspeed_autotp import TPTrainingConfig
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.layers.embedding import VocabularyEmbedding
from deepspeed_autotp.layers.linear import ColumnLinear, RowLinear
from deepspeed_autotp.planning.model_description import describe
from deepspeed_autotp.planning.planner import PlanRequest, make_plan
from deepspeed_autotp.sharding.conversion import Conversion
from tests.support.model_snapshot import Snapshot
from tests.support.small_models import build, tokens

RULES = PlanRequest()


def conversion(model: nn.Module, request: PlanRequest = RULES) -> Conversion:
    description = describe(model)
    ranks = dist.get_world_size()
    settings = TPTrainingConfig(autotp_size=ranks)
    plan = make_plan(description, settings, ranks=ranks, request=request)
    assert dist.group.WORLD is not None
    return Conversion(description, plan=plan, group=TPGroup(dist.group.WORLD), overlap=True)


def small(**changes: Any) -> nn.Module:
    model = build("llama", tied=False, num_key_value_heads=1, **changes)
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    return model


def undone(lend: bool) -> bool:
    """Whether the model is, bit by bit, what it was before it was switched over."""
    model = small()
    before = Snapshot(model)
    done = conversion(model)
    done.switch()
    if lend:
        done.swap_in_views()
    assert type(model.model.layers[0].mlp.up_proj) is ColumnLinear
    done.undo()
    before.check()
    done.undo()  # nothing is left to undo
    before.check()
    return True


def left_on_modules() -> dict[str, set[str]]:
    """The attributes that sharding adds to modules, by the module's name."""
    model = build("llama", tied=False, num_hidden_layers=2, attention_dropout=0.1)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    config = {"sequence_parallel": True, "self_check": False}
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=config)
    model(input_ids=tokens(0), labels=tokens(0))
    return {
        name: added
        for name, module in model.named_modules()
        if (added := set(vars(module)) - before[name])
    }


def stopped_halfway() -> bool:
    """Whether a conversion that fails within a stack leaves the model as it was."""
    model = small()
    before = Snapshot(model)
    done = conversion(model, PlanRequest(sequence_parallel=True))
    network = type(model.model.layers[0].mlp)
    with mock.patch.object(network, "forward", lambda self: None):
        try:
            done.switch()
        except ValueError as error:
            assert "takes no argument" in str(error)
            done.undo()
            before.check()
            return True
    return False


def swapped_in() -> dict[str, bool]:
    """Views cost no memory: which shards are in the memory of the full weights."""
    model = small()
    full = {name: p.untyped_storage().data_ptr() for name, p in model.named_parameters()}
    done = conversion(model)
    done.switch()
    done.swap_in_views()
    return {
        name.rpartition("layers.0.")[2]: p.untyped_storage().data_ptr() == full[name]
        for name, p in model.named_parameters()
        if "layers.1" not in name
    }


def committed() -> dict[str, Any]:
    """Identities, classes, storages and flags after the last step."""
    model = small()
    identities = [id(p) for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    done = conversion(model)
    done.switch()
    done.commit()
    layer = model.model.layers[0]
    return {
        "identities": [id(p) for p in model.parameters()] == identities,
        "flags": [p.requires_grad for p in model.parameters()] == flags and False in flags,
        "classes": (
            type(layer.self_attn.q_proj) is ColumnLinear,
            type(layer.self_attn.o_proj) is RowLinear,
            type(model.model.embed_tokens) is VocabularyEmbedding,
        ),
        "storages": all(
            p.untyped_storage().nbytes() == p.numel() * p.itemsize for p in model.parameters()
        ),
        "contiguous": all(p.is_contiguous() for p in model.parameters()),
        "features": (layer.mlp.up_proj.out_features, layer.mlp.down_proj.in_features),
        "runs": model(input_ids=tokens(0)).logits.shape,
    }


def two_models() -> tuple[int, int, bool]:
    """A model that shares its configuration object with another, which stays unsharded."""
    from transformers import LlamaForCausalLM

    model = small()
    other = LlamaForCausalLM(model.config)
    expected = other(input_ids=tokens(0)).logits
    done = conversion(model)
    done.switch()
    done.commit()
    attention = model.model.layers[0].self_attn
    same = torch.equal(other(input_ids=tokens(0)).logits, expected)
    return attention.config.hidden_size, model.config.num_key_value_heads, same
