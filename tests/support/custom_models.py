# SPDX-License-Identifier: Apache-2.0
"""Language models that no library knows, each with something that its names do not tell.

All take token ids and the ids to predict, and give the loss; what the arguments are called differs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 120
HIDDEN = 48


def _attend(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Causal attention of [B, T, heads * size] each; fewer keys than heads are repeated."""
    q, k, v = (each.unflatten(-1, (-1, size)).transpose(1, 2) for each in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).flatten(2)


class GroupedAttention(nn.Module):
    """Grouped heads whose counts are attributes with names of their own, used in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.n_q, self.n_groups, self.dim_head = 12, 6, 4
        self.to_q = nn.Linear(HIDDEN, self.n_q * self.dim_head, bias=False)
        self.to_k = nn.Linear(HIDDEN, self.n_groups * self.dim_head, bias=False)
        self.to_v = nn.Linear(HIDDEN, self.n_groups * self.dim_head, bias=False)
        self.to_out = nn.Linear(self.n_q * self.dim_head, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q = self.to_q(x).view(rows, length, self.n_q, self.dim_head).transpose(1, 2)
        k = self.to_k(x).view(rows, length, self.n_groups, self.dim_head).transpose(1, 2)
        v = self.to_v(x).view(rows, length, self.n_groups, self.dim_head).transpose(1, 2)
        k, v = (t.repeat_interleave(self.n_q // self.n_groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        out: Tensor = self.to_out(y.reshape(rows, length, self.n_q * self.dim_head))
        return out


class InterleavedAttention(nn.Module):
    """One projection whose output has q, k and v of the first head, then of the second, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 6
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        mixed = self.qkv(x).view(rows, length, self.heads, 3, -1)
        q, k, v = mixed.permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        out: Tensor = self.proj(y.flatten(2))
        return out


class GroupedProjection(nn.Module):
    """One projection whose output has the queries, the key and the value of the first group, then
    of the second, ...; ``groups`` is what the number of groups is called."""

    def __init__(self, groups: str = "num_key_value_heads") -> None:
        super().__init__()
        self.groups, self.num_heads, self.head_dim = groups, 12, 4
        vars(self)[groups] = 6
        self.wqkv = nn.Linear(HIDDEN, (12 + 2 * 6) * 4, bias=False)
        self.wo = nn.Linear(12 * 4, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        mixed = self.wqkv(x).view(rows, length, vars(self)[self.groups], -1, self.head_dim)
        q, k, v = (mixed[..., :-2, :], mixed[..., -2, :], mixed[..., -1, :])
        q = q.reshape(rows, length, self.num_heads * self.head_dim)
        out: Tensor = self.wo(_attend(q, k.flatten(2), v.flatten(2), self.head_dim))
        return out


class MultiQueryAttention(nn.Module):
    """All query heads read one key and one value head, which are one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HIDDEN)
        self.kv = nn.Linear(HIDDEN, 2 * 8)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, dim=-1)
        out: Tensor = self.out(_attend(self.query(x), k, v, 8))
        return out


class ShortNames(nn.Module):
    """Attention whose layers are called by one letter."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(3))
        self.o = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(_attend(self.q(x), self.k(x), self.v(x), 8))
        return out


class TwoLinears(nn.Module):
    """Two layers called ``q`` and ``o`` with nothing but a product between them."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.o = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.o(F.gelu(self.q(x)))
        return y


class FeedForward(nn.Module):
    """As most models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.fc2 = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class InnerNorm(nn.Module):
    """A norm over the full width between the two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.norm = nn.LayerNorm(2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.norm(self.up(x))))
        return y


class Mixture(nn.Module):
    """A router and four experts, of which each token visits two."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 4, bias=False)
        self.experts = nn.ModuleList([FeedForward() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2, dim=-1)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(chosen == index)
            y = y.index_add(0, token, expert(tokens[token]) * weights[token, place, None])
        return y.view_as(x)


class TwoInputs(nn.Module):
    """One layer that is given two different inputs in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.fc2 = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        shifted = x.roll(1, dims=1)
        y: Tensor = self.fc2(F.silu(self.fc1(x)) * self.fc1(shifted))
        return y


class UncalledLayers(FeedForward):
    """The weights of layers, without their forward."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(F.linear(x, self.fc1.weight, self.fc1.bias))
        return F.linear(y, self.fc2.weight, self.fc2.bias)


class Block(nn.Module):
    """Two residual branches behind norms."""

    def __init__(self, attention: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.attention, self.network = attention, network
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.network(self.norm2(x))
        return y


class Language(nn.Module):
    """An embedding, blocks, a head."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.norm(x))
        return y

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())


class Annotated(Language):
    """Arguments whose names say nothing and whose annotations say nothing but tensor."""

    def forward(self, idx: Tensor, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
        logits = self.logits(idx)
        if y is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


class TiedLanguage(Language):
    """The weight of the embedding in place of a head, without a layer that has it."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        del self.head

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


class PenalizedLanguage(Language):
    """A loss that has the size of a weight in it."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return super().forward(tokens, targets) + self.embedding.weight.pow(2).sum()


@dataclass(frozen=True, slots=True)
class Custom:
    """``kind`` is the class of the model; ``shared``: one block stands for all layers."""

    attention: Callable[[], nn.Module] = ShortNames
    network: Callable[[], nn.Module] = FeedForward
    kind: type[Language] = Language
    shared: bool = False


MODELS = {
    "grouped attention": Custom(attention=GroupedAttention),
    "interleaved q|k|v": Custom(attention=InterleavedAttention),
    "multi-query attention": Custom(attention=MultiQueryAttention),
    "short names": Custom(),
    "two linears": Custom(network=TwoLinears),
    "inner norm": Custom(network=InnerNorm),
    "mixture of experts": Custom(network=Mixture, kind=Annotated),
    "two inputs": Custom(network=TwoInputs, kind=Annotated),
    "shared layers": Custom(shared=True),
}

# Of which not all is sharded.
PARTLY = {
    "uncalled layers": Custom(attention=GroupedAttention, network=UncalledLayers),
    "tied by its weight": Custom(attention=GroupedAttention, kind=TiedLanguage),
    "penalized weight": Custom(attention=GroupedAttention, kind=PenalizedLanguage),
}


def build(name: str, seed: int = 0) -> Language:
    """A model of two layers, the same for every rank."""
    torch.manual_seed(seed)
    custom = (MODELS | PARTLY)[name]
    blocks: list[nn.Module] = [Block(custom.attention(), custom.network()) for _ in range(2)]
    return custom.kind(blocks[:1] * 2 if custom.shared else blocks)


def batch(step: int, *, rows: int = 4, length: int = 10) -> tuple[Tensor, Tensor]:
    """Tokens and what follows them."""
    draw = torch.Generator().manual_seed(50 + step)
    ids = torch.randint(VOCABULARY, (rows, length + 1), generator=draw)
    return ids[:, :-1], ids[:, 1:]
