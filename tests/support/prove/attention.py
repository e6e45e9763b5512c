# SPDX-License-Identifier: Apache-2.0
"""Attention as users write it: how it is projected and reshaped, what else it has per head."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tests.support.prove.case import Case
from tests.support.prove.linear import called
from tests.support.prove.names import COUNT_NAMES, NAMES
from tests.support.prove.norms import RMS, Dropout

FUSED = ("qkv", "vqk", "per head", "per group", "parameter")
WINDOW = 3


class Attention(nn.Module):
    """Causal attention over ``[B, T, hidden]``."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        heads, groups, size = case.heads, case.groups or case.heads, case.head_size
        self.counts = COUNT_NAMES[case.count_names]
        for name, count in zip(self.counts, (heads, groups, size), strict=True):
            setattr(self, name, count)
        self.q_size, self.kv_size = heads * size, groups * size
        self._add_projections(heads * size, groups * size)
        self._add_norms(heads * size, groups * size)
        self._add_per_head(heads)
        self.drop = Dropout(1, heads) if case.dropout else None

    def _add_projections(self, queries: int, keys: int) -> None:
        case, hidden, size = self.case, self.case.hidden, self.case.head_size
        q, k, v, out, fused, pair = NAMES[case.names]
        biased = case.attention_bias != ""
        if case.projection == "tensors":
            for name, count in ((q, case.heads), (k, keys // size), (v, keys // size)):
                weight = torch.randn(hidden, count, size) / hidden**0.5
                self.register_parameter(name, nn.Parameter(weight))
        elif case.projection == "parameter":
            self.in_weight = nn.Parameter(torch.randn(queries + 2 * keys, hidden) / hidden**0.5)
            self.in_bias = nn.Parameter(torch.randn(queries + 2 * keys)) if biased else None
        elif case.projection in FUSED:
            self.add_module(fused, nn.Linear(hidden, queries + 2 * keys, bias=biased))
        elif case.projection == "latent":
            self.q_down, self.kv_down = nn.Linear(hidden, 8, False), nn.Linear(hidden, 6, False)
            self.q_down_norm, self.kv_down_norm = RMS(8), RMS(6)
            self.add_module(q, nn.Linear(8, queries, bias=biased))
            self.add_module(pair, nn.Linear(6, 2 * keys, bias=biased))
        else:
            self.add_module(q, nn.Linear(hidden, queries, bias=biased))
            if case.projection == "separate":
                self.add_module(k, nn.Linear(hidden, keys, bias=biased))
                self.add_module(v, nn.Linear(hidden, keys, bias=biased))
            elif case.projection == "k is v":
                self.add_module(k, nn.Linear(hidden, keys, bias=biased))
            else:
                self.add_module(pair, nn.Linear(hidden, 2 * keys, bias=biased))
        self.add_module(out, nn.Linear(queries, hidden, bias=case.attention_bias == "all"))

    def _add_norms(self, queries: int, keys: int) -> None:
        case, size = self.case, self.case.head_size
        kind = nn.LayerNorm if case.head_norm.endswith("layer") else RMS
        if case.head_norm.startswith("full"):
            self.q_norm, self.k_norm = kind(queries), kind(keys)
        elif case.head_norm:
            self.q_norm, self.k_norm = kind(size), kind(size)
        if case.before_output == "norm":
            self.out_norm = nn.LayerNorm(queries)
        elif case.before_output == "head norm":
            self.out_norm = RMS(size)
        elif case.before_output == "group norm":
            self.out_norm = nn.GroupNorm(case.heads, queries)
        elif case.before_output == "gate":
            self.gate_proj = nn.Linear(case.hidden, queries)
        elif case.before_output == "head gate":
            self.gate_proj = nn.Linear(case.hidden, case.heads)

    def _add_per_head(self, heads: int) -> None:
        case = self.case
        shapes = {
            "temperature": (heads, 1, 1),
            "one temperature": (1,),
            "outer temperature": (1,),
            "sinks": (heads,),
            "offset": (heads, 1, case.head_size),
            "talking": (heads, heads),
        }
        if case.per_head:
            self.per_head = nn.Parameter(1 + torch.rand(shapes[case.per_head]))
        if case.convolution:
            width = heads * case.head_size
            self.conv = nn.Conv1d(width, width, 3, padding=2, groups=width)
        if case.positions == "alibi":
            self.register_buffer("slopes", -(2.0 ** -torch.arange(1.0, heads + 1)))
        elif case.positions == "table":
            self.relative_attention_bias = nn.Embedding(2 * case.length, heads)

    def forward(self, x: Tensor) -> Tensor:
        case, out = self.case, NAMES[self.case.names][3]
        q, k, v = self.project(x)
        if case.convolution:
            q = self.conv(q.transpose(1, 2))[..., : q.shape[1]].transpose(1, 2)
        if case.head_norm.startswith("full"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (
            self.as_heads(each, count) for each, count in zip((q, k, v), (0, 1, 1), strict=True)
        )
        if case.head_norm.startswith("per head"):
            q, k = self.q_norm(q), self.k_norm(k)
        if case.positions == "rotary":
            q, k = rotate(q), rotate(k)
        if case.per_head in ("temperature", "one temperature"):
            q = q * self.per_head
        elif case.per_head == "offset":
            q = q + self.per_head
        repeats = q.shape[1] // k.shape[1]
        y = self.attend(q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))
        y = self.finish(x, y.transpose(1, 2))
        y = self.apply_layer(out, y)
        return y * self.per_head if case.per_head == "outer temperature" else y

    def apply_layer(self, name: str, x: Tensor) -> Tensor:
        return called(self.case, self.get_submodule(name), x)

    def as_heads(self, x: Tensor, count: int) -> Tensor:
        """``[B, T, n * size]`` as ``[B, n, T, size]``."""
        size = getattr(self, self.counts[2])
        if self.case.reads == "einops":
            heads = getattr(self, self.counts[count])
            split: Tensor = rearrange(x, "b t (n d) -> b n t d", n=heads)
            return split
        if self.case.reads == "counts":
            x = x.view(*x.shape[:-1], getattr(self, self.counts[count]), size)
        else:
            x = x.unflatten(-1, (-1, size))
        return x.transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of ``[B, T, n * size]``."""
        q, k, v, _, fused, pair = NAMES[self.case.names]
        projection = self.case.projection
        if projection == "tensors":
            weights = (getattr(self, name) for name in (q, k, v))
            return tuple(torch.einsum("btc,cnd->btnd", x, w).flatten(-2) for w in weights)
        if projection == "parameter":
            return self.parted(F.linear(x, self.in_weight, self.in_bias))
        if projection in ("qkv", "vqk"):
            return self.parted(self.apply_layer(fused, x))
        if projection in ("per head", "per group"):
            return self.grouped(self.apply_layer(fused, x))
        if projection == "latent":
            low = self.kv_down_norm(self.kv_down(x))
            queries = self.apply_layer(q, self.q_down_norm(self.q_down(x)))
            return queries, *self.apply_layer(pair, low).chunk(2, dim=-1)
        queries = self.apply_layer(q, x)
        if projection == "k is v":
            keys = self.apply_layer(k, x)
            return queries, keys, keys
        if projection == "q, kv":
            return queries, *self.apply_layer(pair, x).chunk(2, dim=-1)
        if projection == "q, kv per head":
            both = self.apply_layer(pair, x).unflatten(-1, (-1, 2, self.case.head_size))
            return queries, both[..., 0, :].flatten(-2), both[..., 1, :].flatten(-2)
        return queries, self.apply_layer(k, x), self.apply_layer(v, x)

    def parted(self, mixed: Tensor) -> tuple[Tensor, ...]:
        """Pieces one after the other."""
        heads, groups = (getattr(self, name) for name in self.counts[:2])
        size = self.case.head_size
        if self.case.reads == "counts":
            widths = [heads * size, groups * size]
        elif self.case.reads == "sizes":
            widths = [self.q_size, self.kv_size]
        else:
            total = self.q_size + 2 * self.kv_size
            widths = [mixed.shape[-1] * each // total for each in (self.q_size, self.kv_size)]
        if self.case.projection == "vqk":
            v, q, k = mixed.split([widths[1], widths[0], widths[1]], dim=-1)
            return q, k, v
        return mixed.split([widths[0], widths[1], widths[1]], dim=-1)

    def grouped(self, mixed: Tensor) -> tuple[Tensor, ...]:
        """Queries, one key and one value of each group, one group after the other."""
        case = self.case
        per = case.heads // (case.groups or case.heads) + 2
        count = getattr(self, self.counts[1]) if case.reads == "counts" else -1
        mixed = mixed.unflatten(-1, (count, per, case.head_size))
        q, k, v = mixed[..., :-2, :], mixed[..., -2, :], mixed[..., -1, :]
        return q.flatten(-3), k.flatten(-2), v.flatten(-2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of ``[B, heads, T, size]`` each."""
        case, length = self.case, q.shape[2]
        bias = self.bias(length).to(q.dtype)
        scale = self.scale(q)
        if case.product in ("sdpa", "window") and self.drop is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        scores = q @ k.transpose(-1, -2) * scale
        if case.product == "capped":
            scores = 2 * torch.tanh(scores / 2)
        scores = scores + bias
        if case.per_head == "sinks":
            sinks = self.per_head[None, :, None, None].expand(len(q), -1, length, 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        if case.per_head == "talking":
            weights = torch.einsum("bhqk,hg->bgqk", weights, self.per_head)
        return (weights if self.drop is None else self.drop(weights)) @ v

    def scale(self, q: Tensor) -> float:
        """What scores are multiplied with; from numbers that are other ones on a rank."""
        heads = getattr(self, self.counts[0])
        if self.case.scale == "counts":
            return float((self.q_size // heads) ** -0.5)
        if self.case.scale == "over heads":
            return 1.0 / float(q.shape[1])
        return float(q.shape[-1] ** -0.5)

    def bias(self, length: int) -> Tensor:
        """What is added to the scores: causal, ``[T, T]`` or ``[heads, T, T]``."""
        case = self.case
        steps = torch.arange(length)
        apart = steps[:, None] - steps[None, :]
        hidden = apart < 0
        if case.product == "window":
            hidden = hidden | (apart >= WINDOW)
        bias = torch.zeros(length, length).masked_fill(hidden, float("-inf"))
        if case.positions == "alibi":
            return self.slopes[:, None, None] * apart.clamp(min=0) + bias
        if case.positions == "table":
            table: Tensor = self.relative_attention_bias(apart.clamp(min=0)).permute(2, 0, 1)
            return table + bias
        return bias

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """``[B, T, heads, size]`` as the output layer takes it."""
        kind = self.case.before_output
        if kind == "head norm":
            y = self.out_norm(y)
        elif kind == "head gate":
            y = y * self.gate_proj(x).sigmoid()[..., None]
        if self.case.reads == "einops":
            y = rearrange(y, "b t n d -> b t (n d)")
        elif self.case.reads == "counts":
            heads, _, size = (getattr(self, name) for name in self.counts)
            y = y.reshape(*y.shape[:2], heads * size)
        else:
            y = y.flatten(2)
        if kind == "norm":
            y = self.out_norm(y)
        elif kind == "group norm":
            y = self.out_norm(y.flatten(0, 1)).view_as(y)
        elif kind == "mean":
            y = y - y.mean(-1, keepdim=True)
        elif kind == "gate":
            y = y * self.gate_proj(x).sigmoid()
        return y


class TorchAttention(nn.Module):
    """torch's own."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        width = case.heads * case.head_size
        self.down = nn.Linear(case.hidden, width) if width != case.hidden else nn.Identity()
        self.attn = nn.MultiheadAttention(width, case.heads, batch_first=True)
        self.up = nn.Linear(width, case.hidden) if width != case.hidden else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y: Tensor = self.up(self.attn(x, x, x, attn_mask=mask, need_weights=False)[0])
        return y


def rotate(x: Tensor) -> Tensor:
    """Rotary positions of ``[B, n, T, size]``."""
    size, length = x.shape[-1], x.shape[-2]
    rates = 10.0 ** -torch.arange(0, size, 2, dtype=x.dtype).div(size)
    angles = torch.arange(length, dtype=x.dtype)[:, None] * rates
    angles = torch.cat([angles, angles], -1)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def make_attention(case: Case) -> nn.Module:
    return TorchAttention(case) if case.projection == "torch" else Attention(case)
