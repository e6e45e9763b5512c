# SPDX-License-Identifier: Apache-2.0
"""Full weights given to a sharded model, and calls as one process makes them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from tests.support.engine_config import Setting, engine_config
from tests.support.raised_error import raised_error
from tests.support.small_models import build, tokens


def _sharded(family: str, **changes: Any) -> Any:
    model = build(family, tied=True, **changes)
    return deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())


def _differ(model: nn.Module, plain: nn.Module) -> list[str]:
    full, expected = deepspeed_autotp.full_state_dict(model), plain.state_dict()
    assert full.keys() == expected.keys()
    return [name for name in full if not torch.equal(full[name], expected[name])]


def given(family: str) -> dict[str, list[str]]:
    """What differs from the unsharded model after each way to give a model other weights."""
    model, found = _sharded(family), {}
    plain: Any = build(family, tied=True, seed=1)
    model.load_state_dict(plain.state_dict())
    found["loaded"] = _differ(model, plain)
    model.base_model.load_state_dict(build(family, tied=True, seed=2).base_model.state_dict())
    plain.base_model.load_state_dict(build(family, tied=True, seed=2).base_model.state_dict())
    found["a part loaded"] = _differ(model, plain)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(own)
    found["own shards"] = _differ(model, plain)
    return found


def clipped() -> list[tuple[float, float]]:
    """The norms by the form of the call, of the sharded model and of one process."""
    found = []
    for part in ("all", "one", "some"):
        norms = []
        for model in (_sharded("llama"), build("llama", tied=True)):
            model(input_ids=tokens(0), labels=tokens(0)).loss.backward()
            named = dict(model.named_parameters())
            clip: Any = deepspeed_autotp.clip_grad_norm_
            parameters: Any = model.parameters()
            if part == "one":
                parameters = named["model.layers.0.self_attn.q_proj.weight"]
            elif part == "some":
                parameters = [p for name, p in named.items() if "mlp" in name or "norm" in name]
            norms.append(float(clip(parameters, 0.01)))
            norms.append(float(clip(model, 1e9)))
        found += [(norms[0], norms[2]), (norms[1], norms[3])]
    return found


def clipped_together() -> str:
    """What clipping the parameters of two sharded models by one norm says."""
    two: list[Any] = [_sharded("llama"), _sharded("gpt2")]
    parameters = [parameter for model in two for parameter in model.parameters()]
    return raised_error(lambda: deepspeed_autotp.clip_grad_norm_(parameters, 1.0))


def attention_maps() -> tuple[str, int]:
    """What asking for the attention maps says, and their heads where attention is replicated."""
    eager = {"attn_implementation": "eager"}
    model = _sharded("llama", **eager)
    said = raised_error(lambda: model(input_ids=tokens(0), output_attentions=True))
    rules = [
        {"patterns": [r".*(gate|up)_proj\.weight"], "partition_type": "column"},
        {"patterns": [r".*down_proj\.weight"], "partition_type": "row"},
    ]
    replicated: Any = deepspeed_autotp.parallelize(
        build("llama", tied=True, **eager),
        tp_size=dist.get_world_size(),
        config={"partition_config": {"use_default_specs": False, "layer_specs": rules}},
    )
    maps = replicated(input_ids=tokens(0), output_attentions=True).attentions
    return said, maps[0].shape[1]


class Teacher(nn.Module):
    """A model whose forward is given a function and a module."""

    def __init__(self) -> None:
        super().__init__()
        self.student = build("llama", tied=False)

    def forward(self, batch: dict[str, Any], function: Any, head: nn.Module) -> Any:
        return function(head(self.student(**batch).logits)).mean()


def with_functions(tp: int) -> float:
    """The loss of an engine whose forward is given more than tensors."""
    torch.manual_seed(0)
    model, head = Teacher(), nn.Linear(96, 4)
    inputs = {"batch": {"input_ids": tokens(0)}, "function": torch.tanh, "head": head}
    engine, *_ = deepspeed_autotp.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config=engine_config(Setting(tp=tp, zero=1, clip=0.0)),
        example_inputs=inputs,
    )
    for _ in range(2):
        loss = engine({"input_ids": tokens(0)}, lambda x: x.square(), head)
        engine.backward(loss)
        engine.step()
    return float(loss.detach())
