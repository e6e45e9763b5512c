# SPDX-License-Identifier: Apache-2.0
"""Models whose tokens are sharded between blocks."""

import copy
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.handmade_model import PARTITION, build_handmade, example
from tests.support.raised_error import raised_error
from tests.support.recorded_collectives import recorded_collectives
from tests.support.small_models import build, tokens
from tests.support.training_loops import apart, loss_of, train_sharded, train_unsharded

NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
# Whose own names of the sizes are others.
GPT2: dict[str, Any] = {"num_key_value_heads": 8, "bos_token_id": 0, "eos_token_id": 0}
OPT: dict[str, Any] = {"ffn_dim": 112, "word_embed_proj_dim": 64}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "bos_token_id": 0, "eos_token_id": 0}
MORE: dict[str, dict[str, Any]] = {
    "gpt2": GPT2 | NO_DROPOUT,
    "gpt_neox": {},
    "mixtral": EXPERTS | {"pad_token_id": 0},
}


def pair(family: str, *, double: bool = True, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """An unsharded model, and the same one sharded over all ranks with its tokens sharded."""
    changes = MORE.get(family, {}) | changes
    unsharded, sharded = (build(family, tied=False, **changes) for _ in range(2))
    if double:
        unsharded, sharded = unsharded.double(), sharded.double()
    return unsharded, shard(sharded)


def shard(model: nn.Module, **more: Any) -> nn.Module:
    config = {"sequence_parallel": True, **more.pop("config", {})}
    return deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=config, **more)


def plain_loops(cases: list[tuple[str, bool | None, int]]) -> dict[str, dict[str, float]]:
    """Distances to one process for a family, re-entrant or other checkpoints or none, and a
    number of micro-batches."""
    found = {}
    for family, reentrant, accumulate in cases:
        unsharded, sharded = pair(family, double=family != "mixtral")
        for model in (unsharded, sharded):
            if reentrant is not None:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        expected = train_unsharded(unsharded, accumulate=accumulate, steps=3)
        own = train_sharded(sharded, accumulate=accumulate, steps=3)
        found[f"{family} {reentrant} {accumulate}"] = apart(unsharded, sharded, (expected, own))
    return found


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def few_tokens() -> tuple[float, float]:
    """Worst gradient of a norm, of batches with fewer tokens than ranks and of two calls of other
    lengths before one backward, whose layers are computed twice."""
    worst = []
    for lengths, reentrant in (((1,), None), ((13, 14, 3), False)):
        unsharded, sharded = pair("llama")
        for model in (unsharded, sharded):
            if reentrant is not None:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
            outputs = [
                model(input_ids=tokens(step, rows=1, length=length)).logits
                for step, length in enumerate(lengths)
            ]
            sum((y.square().sum() for y in outputs), torch.zeros(())).backward()
        expected, own = _gradients(unsharded), _gradients(sharded)
        norms = [name for name in expected if "norm" in name]
        worst.append(max(float((own[n] - expected[n]).abs().max()) for n in norms))
    return worst[0], worst[1]


def collectives_of_a_layer() -> tuple[dict[str, int], dict[str, int]]:
    """What one more layer costs, forward and backward."""
    costs = []
    for layers in (1, 2):
        model = shard(build("llama", tied=False, num_hidden_layers=layers))
        loss_of(model, tokens(0))  # the first call compares the batches
        with recorded_collectives() as forward:
            loss = loss_of(model, tokens(0))
        with recorded_collectives() as backward:
            loss.backward()
        costs.append([_by_name(calls) for calls in (forward, backward)])
    (forward_once, backward_once), (forward_twice, backward_twice) = costs
    return dict(forward_twice - forward_once), dict(backward_twice - backward_once)


def _by_name(calls: list[tuple[str, int]]) -> Counter[str]:
    """How many there are of each kind; those of at most 1 KiB are small ones."""
    return Counter(f"small {kind}" if size <= 1024 else kind for kind, size in calls)


def saved_between_blocks() -> tuple[float, float]:
    """Bytes that autograd keeps of a step, with tokens sharded over those without: in the norms and
    residuals of the layers, and in all."""
    kept = []
    for sequence in (False, True):
        model = build("llama", tied=False, num_hidden_layers=3)
        config = {"sequence_parallel": sequence}
        deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=config)
        kept.append(_kept(model))
    (between, total), (own_between, own_total) = kept
    return own_between / between, own_total / total


def _kept(model: nn.Module) -> tuple[int, int]:
    """Of each storage once: in a norm between the blocks, and anywhere, parameters aside."""
    found: dict[int, tuple[int, bool]] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    inside: list[bool] = [False]
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held.append(storage)
            found.setdefault(storage.data_ptr(), (storage.nbytes(), inside[0]))
        return tensor

    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            module.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
            module.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=tokens(0)).logits.sum()
    sizes = found.values()
    return sum(size for size, within in sizes if within), sum(size for size, _ in sizes)


class Drop(nn.Module):
    """Dropout that is seen, in the place of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.nn.functional.dropout(torch.ones_like(x), 0.5, self.training)
        self.seen.append(mask.detach())
        return x * mask


def dropout() -> tuple[bool, bool, list[float], list[float]]:
    """Whether ranks drop other features of their tokens, and the same of all tokens; losses and
    gradients with checkpoints less those without."""
    model = build("gpt2", tied=False, **GPT2, resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3)
    model.double()
    block = model.transformer.h[1]
    drop, unsharded = Drop(), Drop()
    block.ln_2 = nn.Sequential(block.ln_2, drop)
    model.transformer.drop = unsharded
    shard(model)
    found = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        del drop.seen[:], unsharded.seen[:]
        torch.manual_seed(3)
        model.zero_grad()
        loss = loss_of(model, tokens(0))
        loss.backward()
        found.append((float(loss.detach()), _gradients(model)))
    first = [torch.empty_like(drop.seen[0]) for _ in range(dist.get_world_size())]
    dist.all_gather(first, drop.seen[0])
    second = [torch.empty_like(unsharded.seen[0]) for _ in first]
    dist.all_gather(second, unsharded.seen[0])
    (loss, gradients), *others = found
    return (
        torch.equal(first[0], first[1]),
        torch.equal(second[0], second[1]),
        [abs(other - loss) for other, _ in others],
        [
            max(float((other[n] - g).abs().max()) for n, g in gradients.items())
            for _, other in others
        ],
    )


def generates() -> tuple[bool, float, dict[str, float]]:
    """Whether a trained model gives the tokens of the unsharded one, how far its logits are in
    evaluation; and how far a copy of it is after training on."""
    unsharded, sharded = pair("qwen3")
    curves = train_unsharded(unsharded, steps=2), train_sharded(sharded, steps=2)
    apart(unsharded, sharded, curves)
    twin = copy.deepcopy(sharded)
    ids = tokens(0, rows=2, length=3)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        far = (sharded(input_ids=ids).logits - unsharded(input_ids=ids).logits).abs().max()
    said = [m.eval().generate(ids, **settings) for m in (unsharded, sharded)]  # type: ignore[operator]
    unsharded.train()
    return (
        torch.equal(*said),
        float(far),
        apart(unsharded, twin, (train_unsharded(unsharded, steps=2), train_sharded(twin, steps=2))),
    )


class Shifted(nn.Module):
    """A norm that looks at the token before."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + x.roll(1, dims=1))
        return y


def refused() -> tuple[dict[str, str], bool]:
    """The errors of models and uses that cannot be; and whether a refused model is unchanged."""
    mixing = build_handmade()
    mixing.blocks[1].norms[1] = Shifted(mixing.blocks[1].norms[1])
    lone = nn.ModuleDict({"mlp": build_handmade().blocks[0].mlp})
    state = {name: tensor.clone() for name, tensor in mixing.state_dict().items()}
    classes = [type(module) for module in mixing.modules()]
    rules = {"partition_config": PARTITION}
    model = shard(build("llama", tied=False))
    ids = tokens(0)
    said = {
        "mixing": raised_error(lambda: shard(mixing, config=rules, example_inputs=example())),
        "no list": raised_error(lambda: shard(lone, config=rules, example_inputs={})),
        "unknown": raised_error(lambda: shard(build_handmade(), config=rules)),
        "dropping": raised_error(lambda: shard(build("opt", tied=False, **OPT, layerdrop=0.5))),
        "alone": raised_error(lambda: model.model.layers[0].mlp(torch.ones(1, 4, 64))),
        "skipped": raised_error(lambda: _skip(model, ids)),
    }
    same = all(torch.equal(state[n], tensor) for n, tensor in mixing.state_dict().items())
    return said, same and classes == [type(module) for module in mixing.modules()]


def _skip(model: Any, ids: Tensor) -> None:
    layers = model.model.layers
    model.model.layers = layers[:-1]
    try:
        model(input_ids=ids)
    finally:
        model.model.layers = layers
