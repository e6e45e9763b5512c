# SPDX-License-Identifier: Apache-2.0
"""Hidden states of models whose tokens are sharded between blocks, and losses of them."""

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.handmade_model import PARTITION, build_handmade, example
from tests.support.loss_curves import RATE
from tests.support.raised_error import raised_error
from tests.support.recorded_collectives import recorded_collectives
from tests.support.small_models import build, tokens

# By the way in which a model records: hooks of transformers at the model that holds the layers, or
# at one above, and a loop over the layers.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "bert": {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gptj": {
        "n_head": 8,
        "n_layer": 2,
        "n_embd": 64,
        "n_inner": 112,
        "rotary_dim": 8,
        "num_key_value_heads": 8,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
}


def pair(family: str, **changes: Any) -> tuple[Any, Any]:
    """An unsharded model, and the same one sharded over all ranks with its tokens sharded."""
    changes = MODELS[family] | changes
    unsharded, sharded = (build(family, tied=False, **changes).double() for _ in range(2))
    config = {"sequence_parallel": True}
    size = dist.get_world_size()
    return unsharded, deepspeed_autotp.parallelize(sharded, tp_size=size, config=config)


def _total(states: Any) -> Tensor:
    """A loss in which each value counts otherwise."""
    total = torch.zeros(())
    for number, state in enumerate(states):
        if state is not None:
            weights = torch.linspace(0, 1 + number, state.numel(), dtype=state.dtype)
            total = total + (weights.view(state.shape) * state.square()).mean()
    return total


def _step(model: Any, *args: Any, **asked: Any) -> Any:
    """The hidden states of a step with a loss of these and of the logits."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    outputs = model(tokens(0, rows=1, length=13), *args, **asked)
    (_total(outputs.hidden_states) + outputs.logits.square().mean()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return outputs.hidden_states


def _differences(models: Any, states: Any) -> dict[str, float]:
    """Largest ones of the hidden states of a step, and of the weights behind it."""
    (unsharded, sharded), (expected, own) = models, states
    weights = deepspeed_autotp.full_state_dict(sharded)
    deepspeed_autotp.check_replicas(sharded)
    assert [state is None for state in own] == [state is None for state in expected]
    return {
        "states": max(
            float((a - b).detach().abs().max())
            for a, b in zip(own, expected, strict=True)
            if a is not None
        ),
        "weights": max(
            float((weights[n] - t).abs().max()) for n, t in unsharded.state_dict().items()
        ),
    }


def asked(family: str, ways: list[str]) -> dict[str, dict[str, float]]:
    """Differences to one process for each way to ask."""
    found = {}
    for way in ways:
        models = pair(family)
        args: list[Any] = []
        more: dict[str, Any] = {"output_hidden_states": True}
        for model in models:
            if way == "configuration":
                model.config.output_hidden_states, more = True, {}
            elif way.endswith("checkpoints"):
                model.gradient_checkpointing_enable({"use_reentrant": way.startswith("reentrant")})
        if way == "one":
            more = {"output_hidden_states": [1]}
        elif way == "position":
            names = list(inspect.signature(models[0].forward).parameters)
            args, more = [None] * names.index("output_hidden_states"), {}
            args[-1] = True
        found[way] = _differences(models, [_step(model, *args, **more) for model in models])
    return found


def encoder_decoder() -> dict[str, float]:
    """Differences to one process with two lists of layers, whose states the model returns."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 64, "d_ff": 112, "num_layers": 3, "num_heads": 8, "d_kv": 8}
    config = T5Config(vocab_size=96, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    models, states = [], []
    for shards in (False, True):
        torch.manual_seed(0)
        model: Any = T5ForConditionalGeneration(config).double().train()
        models.append(model)
        if shards:
            settings = {"sequence_parallel": True}
            deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=settings)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        ids, others = tokens(0, rows=1, length=13), tokens(1, rows=1, length=9)
        outputs = model(input_ids=ids, decoder_input_ids=others, output_hidden_states=True)
        states.append((*outputs.encoder_hidden_states, *outputs.decoder_hidden_states))
        (_total(states[-1]) + outputs.logits.square().mean()).backward()
        optimizer.step()
    return _differences(models, states)


def gathers() -> list[int]:
    """All-gathers of a forward with no hidden states, one of two shards, and both."""
    _, model = pair("llama", num_hidden_layers=3)
    counts = []
    for asked in (None, [2], True):
        with recorded_collectives() as calls:
            model(tokens(0), output_hidden_states=asked)
        # Smaller ones compare what the ranks were given.
        counts.append(sum(kind == "all-gather" and size > 1024 for kind, size in calls))
    return counts


class Doubled(nn.Module):
    """Returns other values than its layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_handmade()
        self.kept: list[Tensor] = []
        self.inner.blocks[0].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, args: Any, output: Tensor) -> None:
        self.kept.append(output)

    def forward(self, x: Tensor, target: Tensor, output_hidden_states: bool = False) -> Any:
        self.kept.clear()
        loss = self.inner(x, target)
        return (loss, [2 * kept for kept in self.kept]) if output_hidden_states else loss


def refused() -> str:
    """The error of a model that records in a way that is not known."""
    config = {"sequence_parallel": True, "partition_config": PARTITION}
    size = dist.get_world_size()
    model = deepspeed_autotp.parallelize(
        Doubled(), tp_size=size, config=config, example_inputs=example()
    )
    model(**example()).backward()
    return raised_error(lambda: model(**example(), output_hidden_states=True))
