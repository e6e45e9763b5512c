# SPDX-License-Identifier: Apache-2.0
"""Losses of models whose tokens stay sharded up to the output head."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import deepspeed_autotp
from tests.support.engine_config import Setting, engine_config
from tests.support.loss_chunks import loss_chunks
from tests.support.loss_curves import RATE, own_rows
from tests.support.output_head_models import VOCABULARY, build, gradient_difference, shard
from tests.support.raised_error import raised_error
from tests.support.recorded_collectives import recorded_collectives
from tests.support.small_models import tokens

CHUNK = 12
HIDDEN_BYTES = 32 * 8  # of a token


class UsesHiddenStates(LlamaForCausalLM):
    """Whose forward does more with its hidden states, and returns them."""

    def change(self, hidden: Tensor) -> Tensor:
        return hidden

    def penalty(self, hidden: Tensor) -> Tensor | float:
        return 0.0

    def states(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return found

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutputWithPast:
        hidden = self.states(input_ids)
        penalty = self.penalty(hidden)
        hidden = self.change(hidden)
        logits = self.lm_head(hidden[:, :, :])
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss + penalty, logits=logits, hidden_states=(hidden,))


class Penalized(UsesHiddenStates):
    def penalty(self, hidden: Tensor) -> Tensor:
        return 0.1 * hidden.float().square().mean() + 0.1 * hidden[0, 1].sum()


class Scaled(UsesHiddenStates):
    def change(self, hidden: Tensor) -> Tensor:
        return hidden * 0.5


class ScaledInPlace(UsesHiddenStates):
    def change(self, hidden: Tensor) -> Tensor:
        return hidden.mul_(0.5)


class ViewScaledInPlace(UsesHiddenStates):
    def change(self, hidden: Tensor) -> Tensor:
        hidden[1].mul_(0.5)
        return hidden


class RetainsGradient(UsesHiddenStates):
    kept: Tensor

    def change(self, hidden: Tensor) -> Tensor:
        hidden.retain_grad()
        self.kept = hidden
        return hidden


class InACheckpoint(UsesHiddenStates):
    """Whose layers and final norm are one checkpoint."""

    def states(self, input_ids: Tensor) -> Tensor:
        states = super().states
        found: Tensor = checkpoint(states, input_ids, use_reentrant=False)
        return found


class Detached(UsesHiddenStates):
    def change(self, hidden: Tensor) -> Tensor:
        return hidden.detach()


class DataScaledInPlace(UsesHiddenStates):
    """By an alias of which torch does not know that it is one."""

    def change(self, hidden: Tensor) -> Tensor:
        hidden.data.mul_(0.5)
        return hidden


class NormByKeyword(UsesHiddenStates):
    def change(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.model.norm(hidden_states=hidden)
        return found


class NormInAReentrantCheckpoint(UsesHiddenStates):
    def change(self, hidden: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.model.norm, hidden, use_reentrant=True)
        return found


class CentersTokensNorm(nn.Module):
    """A norm by its name that works on all tokens of a sequence together."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, features))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * (hidden - hidden.mean(1, keepdim=True))


class AddsResidualNorm(CentersTokensNorm):
    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.weight * (hidden if residual is None else hidden + residual)


class AddsResidual(UsesHiddenStates):
    def change(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.model.last_norm(hidden, torch.full_like(hidden, 0.1))
        return found


CLASSES = {
    each.__name__: each
    for each in (
        *(UsesHiddenStates, Penalized, Scaled, ScaledInPlace, ViewScaledInPlace, Detached),
        *(InACheckpoint, DataScaledInPlace, NormByKeyword, NormInAReentrantCheckpoint),
    )
}


def _other_norm(model: Any) -> None:
    model.model.norm = CentersTokensNorm(model.config.hidden_size)


def _residual_norm(model: Any) -> None:
    model.model.last_norm = AddsResidualNorm(model.config.hidden_size)
    model.__class__ = AddsResidual


def _checkpoints(model: Any, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def _frozen(model: nn.Module, is_frozen: Callable[[str], bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name))


CHANGES: dict[str, Callable[[Any], None]] = {
    "": lambda model: None,
    "checkpoints": lambda model: _checkpoints(model, reentrant=False),
    "reentrant checkpoints": lambda model: _checkpoints(model, reentrant=True),
    "norm of all tokens": _other_norm,
    "norm of a residual": _residual_norm,
    "frozen head": lambda model: _frozen(model, lambda name: "lm_head" in name),
    "frozen norm": lambda model: _frozen(model, lambda name: name == "model.norm.weight"),
    "frozen rest": lambda model: _frozen(model, lambda name: "lm_head" not in name),
}


def a_step(
    family: str, change: str, tied: bool = False, length: int = 12, reads: bool = False
) -> dict[str, Any]:
    """Loss and gradients against one process, the tokens of the logits that the loss is formed of,
    and the rows of hidden states that the last collectives of the forward move."""
    ids = tokens(0, vocabulary=VOCABULARY, length=length)
    labels = ids.clone()
    labels[0, :5] = -100
    unsharded, model = (build(family, tied=tied).double() for _ in range(2))
    for each in (unsharded, model):
        if change in CLASSES:
            each.__class__ = CLASSES[change]
        else:
            CHANGES[change](each)
    # The check asks for gradients in a way that re-entrant checkpoints refuse.
    shard(
        model,
        family,
        sequence_parallel=True,
        self_check="Data" not in change and "Reentrant" not in change,
    )
    with loss_chunks(CHUNK) as seen:
        with recorded_collectives() as calls:
            outputs = model(input_ids=ids, labels=labels)
        loss = outputs.loss
        if reads:
            loss = loss + outputs.logits.logsumexp(-1).square().mean()
        loss.backward()
    expected = unsharded(input_ids=ids, labels=labels)
    total = expected.loss
    if reads:
        total = total + expected.logits.logsumexp(-1).square().mean()
    total.backward()
    moved = [(kind, size // HIDDEN_BYTES) for kind, size in calls if size >= 2 * HIDDEN_BYTES]
    hidden = outputs.hidden_states
    return {
        "loss": abs(float((loss / total).detach()) - 1),
        "gradients": gradient_difference(model, unsharded),
        "chunks": seen,
        "moved": moved[1 + 4 * 2 :],  # behind those of the embedding and the two layers
        "hidden": hidden is None
        or (type(hidden[0]) is Tensor and torch.allclose(hidden[0], expected.hidden_states[0])),
    }


WATCHED = ("output of model.norm", "input of model.norm", "input of lm_head", "all outputs")


def watched_on_one_rank(what: str) -> dict[str, Any]:
    """A step in which a user's hook of rank 0 alone reads hidden states."""
    ids = tokens(0, vocabulary=VOCABULARY)
    unsharded, model = (build("llama", tied=False).double() for _ in range(2))
    unsharded(input_ids=ids, labels=ids).loss.backward()
    shard(model, "llama", sequence_parallel=True)
    seen = []

    def look(module: nn.Module, args: tuple[Tensor], output: Tensor | None = None) -> None:
        watched = {model.get_submodule("model.norm"), model.get_submodule("lm_head")}
        if dist.get_rank() == 0 and module in watched:
            seen.append(float((args[0] if output is None else output).detach().mean()))

    side, _, name = what.partition(" of ")
    if what == "all outputs":
        handle = nn.modules.module.register_module_forward_hook(look)
    elif side == "output":
        handle = model.get_submodule(name).register_forward_hook(look)
    else:
        handle = model.get_submodule(name).register_forward_pre_hook(look)
    with loss_chunks(CHUNK):
        model(input_ids=ids, labels=ids).loss.backward()
    handle.remove()
    return {"gradients": gradient_difference(model, unsharded), "seen": len(seen)}


def gradient_is_retained() -> float:
    """How far the gradient of the hidden states is from that of one process, where it is kept."""
    ids = tokens(0, vocabulary=VOCABULARY)
    unsharded, model = (build("llama", tied=False).double() for _ in range(2))
    for each in (unsharded, model):
        each.__class__ = RetainsGradient
    shard(model, "llama", sequence_parallel=True)
    with loss_chunks(CHUNK):
        for each in (unsharded, model):
            each(input_ids=ids, labels=ids).loss.backward()
    own, expected = (each.kept.grad for each in (model, unsharded))
    return float((own - expected).abs().max() / expected.abs().max())


class IndexesTooMuch(UsesHiddenStates):
    """With one index more than there are dimensions, each of which takes all."""

    def change(self, hidden: Tensor) -> Tensor:
        return hidden[:, :, :, :]


def an_index_too_many() -> list[str]:
    """What one process says, and what a rank says."""
    ids = tokens(0, vocabulary=VOCABULARY)
    unsharded, model = (build("llama", tied=False) for _ in range(2))
    for each in (unsharded, model):
        each.__class__ = IndexesTooMuch
    shard(model, "llama", sequence_parallel=True, self_check=False)
    return [
        raised_error(lambda each=each: each(input_ids=ids, labels=ids))  # type: ignore[misc]
        for each in (unsharded, model)
    ]


class AsksLate(UsesHiddenStates):
    """For the gradient of hidden states, after the head was called."""

    how = ""

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutputWithPast:
        hidden = self.states(input_ids)
        logits = self.lm_head(hidden)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        if self.how == "retain_grad":
            hidden.retain_grad()
        elif self.how == "register_hook":
            hidden.register_hook(lambda gradient: None)
        elif self.how == "grad":
            torch.autograd.grad(loss + hidden.square().mean(), hidden)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=(hidden,))


LATE = ("retain_grad", "register_hook", "grad", "outputs")


def gradient_is_asked_late(how: str) -> str:
    """The error of a step that asks for the gradient of hidden states too late."""
    ids = tokens(0, vocabulary=VOCABULARY)
    model = build("llama", tied=False)
    model.__class__ = AsksLate
    shard(model, "llama", sequence_parallel=True)
    AsksLate.how = how
    try:
        with loss_chunks(CHUNK):
            outputs = model(input_ids=ids, labels=ids)
            if how == "outputs":
                outputs.hidden_states[0].retain_grad()
            outputs.loss.backward()
    except RuntimeError as error:
        return str(error)
    finally:
        AsksLate.how = ""
    return ""


def in_the_engine(zero: int) -> dict[str, Any]:
    """Losses of steps of two micro-batches through DeepSpeed, with clipping, at TP 2."""
    unsharded, model = (build("gemma2", tied=True) for _ in range(2))
    optimizer = torch.optim.SGD(unsharded.parameters(), lr=RATE)
    config = engine_config(Setting(tp=2, zero=zero, clip=1.0, sequence=True))
    del config["train_batch_size"]
    engine, *_ = deepspeed_autotp.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        config={**config, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
    )
    worst = 0.0
    with loss_chunks(CHUNK) as seen:
        for part in range(6):
            ids = tokens(part, vocabulary=VOCABULARY, length=13)
            expected = unsharded(input_ids=ids, labels=ids).loss
            (expected / 2).backward()
            own = own_rows(ids, tp=2)
            loss = engine(input_ids=own, labels=own).loss
            engine.backward(loss)
            engine.step()
            if part % 2:
                nn.utils.clip_grad_norm_(unsharded.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
            worst = max(worst, abs(float(mean / expected.detach()) - 1))
    engine.destroy()
    return {"worst": worst, "chunk": min(seen)}


def rounded(kind: str) -> dict[str, float]:
    """bfloat16 with tokens gathered for the loss, and chunk by chunk: how far gradients are from
    those of float32."""
    ids = tokens(0, length=24, vocabulary=VOCABULARY)
    exact = build("granite", tied=False)
    exact(input_ids=ids, labels=ids).loss.backward()
    apart = {}
    for is_sharded in (False, True):
        model = build("granite", tied=False)
        model = model if kind == "autocast" else model.bfloat16()
        shard(model, "granite", sequence_parallel=is_sharded)
        with (
            loss_chunks(CHUNK),
            torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"),
        ):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        apart["sharded" if is_sharded else "full"] = gradient_difference(model, exact)
    return apart
