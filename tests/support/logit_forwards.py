# SPDX-License-Identifier: Apache-2.0
"""Causal models that do something between their output head and their loss."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast as Output


class Base(LlamaForCausalLM):
    """A Llama with numbers, a parameter and a buffer to change its logits by."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.number, self.nothing = 0.5, None
        self.factor = nn.Parameter(torch.full((1,), 0.5))
        self.register_buffer("bias", torch.linspace(-1, 1, config.vocab_size))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Base):
            with torch.no_grad():
                module.factor.fill_(0.5)
                module.bias.copy_(torch.linspace(-1, 1, module.config.vocab_size))

    def hidden(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=ids, use_cache=False).last_hidden_state
        return found


class Plain(Base):
    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = self.lm_head(self.hidden(input_ids))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **more)
        return Output(loss=loss, logits=logits)


class Scaled(Base):
    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        x = self.lm_head(self.hidden(input_ids)).float()
        by = self.number
        x = nn.functional.tanh(x / 2.0 * by).contiguous()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=x, labels=labels, vocab_size=self.config.vocab_size)
        output = (x,) + (input_ids,)
        return ((loss,) + output) if loss is not None else output


class Upcast(Base):
    """As Mamba."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        hidden = self.hidden(input_ids)
        logits = self.lm_head(hidden.to(self.lm_head.weight.dtype)).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **more)
        return Output(loss=loss, logits=logits)


class UpcastAtTimes(Base):
    """What its logits are is not known from its source."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        x = self.lm_head(self.hidden(input_ids))
        if self.nothing is not None:
            x = x.float()
        loss = None
        if labels is not None:
            loss = self.loss_function(x, labels, self.config.vocab_size, **more)
        return Output(loss=loss, logits=x)


class UpcastInCap(Base):
    """As Beam."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        x = self.lm_head(self.hidden(input_ids))
        if self.number is not None:
            x = x.float() / self.number
            x = torch.tanh(x)
            x = x * self.number
        loss = None
        if labels is not None:
            loss = self.loss_function(x, labels, vocab_size=self.config.vocab_size)
        return Output(loss=loss, logits=x)


class CappedThenScaled(Base):
    """A soft cap that is not the last step is no part of the loss."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        x = self.lm_head(self.hidden(input_ids))
        if self.number is not None:
            x = x / self.number
            x = torch.tanh(x)
            x = x * self.number
        x = x / 0.25
        loss = None
        if labels is not None:
            loss = self.loss_function(x, labels, vocab_size=self.config.vocab_size)
        return Output(loss=loss, logits=x)


class ZLoss(Base):
    """As Bamba with a z-loss: a term of all logits beside the loss."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = self.lm_head(self.hidden(input_ids))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size)
            loss = loss + 0.1 * logits.logsumexp(dim=-1).pow(2).mean()
        return Output(loss=loss, logits=logits)


class Sliced(Base):
    """As models with a padded vocabulary, whose last columns are cut off."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = self.lm_head(self.hidden(input_ids))
        logits = logits[..., : self.config.vocab_size - 1]
        loss = None
        if labels is not None:
            labels = labels.clamp(max=self.config.vocab_size - 2)
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1])
        return Output(loss=loss, logits=logits)


class Masked(Base):
    """As Chameleon, which forbids some columns in place."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = self.lm_head(self.hidden(input_ids))
        logits[..., 3:5] = -20.0
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return Output(loss=loss, logits=logits)


class Factor(Base):
    """A factor that is learnt has a part of its gradient on each rank."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = self.lm_head(self.hidden(input_ids)) * self.factor
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return Output(loss=loss, logits=logits)


class Biased(Base):
    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = self.lm_head(self.hidden(input_ids)) + self.bias
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return Output(loss=loss, logits=logits)


class Centred(Base):
    """The logits less their largest, which no gradient shows."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = self.lm_head(self.hidden(input_ids))
        logits = logits * logits.detach().abs().amax(-1, keepdim=True)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return Output(loss=loss, logits=logits)


class Twice(Base):
    """Two calls of the head."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        hidden = self.hidden(input_ids)
        logits = self.lm_head(hidden)
        other = self.lm_head(hidden.tanh())
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
            loss = loss + other.square().mean()
        return Output(loss=loss, logits=logits)


class Looked(Base):
    """A loss that says how often its logits were right."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = self.lm_head(self.hidden(input_ids))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
            loss = loss + (logits.argmax(-1) == labels).float().mean()
        return Output(loss=loss, logits=logits)


class Own(Base):
    """Its loss is not its loss_function."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = self.lm_head(self.hidden(input_ids))
        loss = None
        if labels is not None:
            wide = logits.view(-1, self.config.vocab_size)
            loss = nn.functional.cross_entropy(wide, labels.view(-1))
        return Output(loss=loss, logits=logits)


class WrittenThrough(Base):
    """A write to what is the same tensor in one process."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = self.lm_head(self.hidden(input_ids))
        logits.float().contiguous()[..., 3:5] = -20.0
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return Output(loss=loss, logits=logits)


class WithoutGradient(Base):
    """A step that no gradient goes through."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = self.lm_head(self.hidden(input_ids))
        with torch.no_grad():
            factor = logits * 0.5
        logits = logits * factor
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return Output(loss=loss, logits=logits)


class TwoLosses(Base):
    """As models that predict several tokens, here with one head."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = self.lm_head(self.hidden(input_ids))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
            later = labels.roll(1, 1)
            loss = loss + self.loss_function(logits, later, vocab_size=self.config.vocab_size)
        return Output(loss=loss, logits=logits)


class Unseen(Base):
    """What is done with the logits of a batch that no self-check takes."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = self.lm_head(self.hidden(input_ids))
        loss = None
        if labels is not None:
            if input_ids.shape == (4, 12):
                logits = logits - logits.topk(3).values.mean(-1, keepdim=True).detach()
                logits = logits * logits.softmax(-1)[..., 96:]
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return Output(loss=loss, logits=logits)


class Direct(Base):
    """A head that is called past its hooks."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = self.lm_head.forward(self.hidden(input_ids))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return Output(loss=loss, logits=logits)


class Nested(Base):
    """A forward that calls the model itself, with and without labels, between head and loss."""

    def forward(self, input_ids: Tensor, labels: Any = None, inner: bool = False) -> Any:
        logits = self.lm_head(self.hidden(input_ids))
        loss = None
        if labels is not None:
            if not inner:
                others = [self(input_ids, None, True), self(input_ids, labels, True)]
                logits = logits / 2.0
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
            if not inner:
                loss = loss + others[0].logits.softmax(-1).square().sum() + others[1].loss
        return Output(loss=loss, logits=logits)


class CheckpointedHead(Base):
    """A head that runs again in the backward, and a term that has a gradient without it."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        hidden = self.hidden(input_ids)
        x = checkpoint(self.lm_head, hidden, use_reentrant=True)
        loss = None
        if labels is not None:
            loss = self.loss_function(x, labels, self.config.vocab_size, **more)
            loss = loss + 0.01 * hidden.square().mean()
        return Output(loss=loss, logits=x)


class CheckpointedLoss(Base):
    """A loss that is formed again in the backward."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        x = self.lm_head(self.hidden(input_ids))
        loss = None
        if labels is not None:
            given = (x, labels, self.config.vocab_size)
            loss = checkpoint(self.loss_function, *given, use_reentrant=True)
        return Output(loss=loss, logits=x)


class LossTwice(Base):
    """A loss without a gradient, to look at, before the one that trains."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        hidden = self.hidden(input_ids)
        x = self.lm_head(hidden) * self.number
        loss = None
        if labels is not None:
            with torch.no_grad():
                seen = self.loss_function(x, labels, self.config.vocab_size, **more)
            loss = self.loss_function(x, labels, self.config.vocab_size, **more)
            loss = loss + 0.01 * hidden.square().mean() + 0 * seen
        return Output(loss=loss, logits=x)


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:  # type: ignore[override]
        return dx / 2


class Function(Base):
    """A function that takes its gradient into its own hands."""

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
        logits = _Halved.apply(self.lm_head(self.hidden(input_ids)))  # type: ignore[no-untyped-call]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return Output(loss=loss, logits=logits)


# Of the first the loss is formed from shards, whatever is gathered besides; of the second it is
# formed from full logits.
SHARDED = (Plain, Scaled, Upcast, UpcastAtTimes, UpcastInCap, CappedThenScaled)
SHARDED += (ZLoss, Twice, Looked, TwoLosses, Nested, LossTwice)
GATHERED = (Sliced, Masked, Factor, Biased, Centred, Own, WrittenThrough, WithoutGradient, Unseen)
GATHERED += (Direct, CheckpointedHead)


def build(name: str, vocabulary: int) -> Any:
    """A model of this module, by the name of its class, in training mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=None,
    )
    return globals()[name](config).train()
