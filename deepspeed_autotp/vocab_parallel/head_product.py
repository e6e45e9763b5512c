# SPDX-License-Identifier: Apache-2.0
"""The product of the output head: its data type, its chunks, and how it waits to be formed.

Logits that only a loss is formed of need not exist: the loss takes the two factors (fused_loss.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed_autotp.distributed.lazy_sequence import own_tokens
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.distributed.sequence_collectives import (
    SequenceLayout,
    with_summed_gradient,
)
from deepspeed_autotp.interop.deepspeed.parameters import is_partitioned
from deepspeed_autotp.interop.fully_shard import stays_gathered
from deepspeed_autotp.interop.torch_private import (
    is_managed_by_fsdp,
    own_parameters,
    version_counter,
)
from deepspeed_autotp.layers.layer_sharding import sharding_of

# A chunk has at least so many tokens, since each chunk reads and writes the gradient of the weight,
# and as many more as make up so many bytes of logits in float32. On one core, loss and gradients of
# 1024 tokens take 0.95 to 1.02 of the time of all logits at once (hidden 128 to 1024, 16,000 and
# 64,128 columns), and 0.97 to 1.11 in chunks of 128 tokens. Those of a GPU were not measured.
_CPU_TOKENS, _CPU_BYTES = 256, 8 << 20
_DEVICE_TOKENS, _DEVICE_BYTES = 1024, 256 << 20
_16_BITS = (torch.float16, torch.bfloat16)
# float16 has no range for a gradient that the loss scale has not been multiplied with.
_DTYPES = {torch.float32, torch.float64, torch.bfloat16}
# A CPU takes 1.3 of the time in bfloat16, whose products it has to form in float32 to sum them.
_CPU_DTYPES = _DTYPES - set(_16_BITS)
_CAST = {torch.float32, torch.bfloat16}  # to that of autocast, which leaves float64 alone


@dataclass(frozen=True, slots=True)
class ShardedTokens:
    """Of hidden states, over the ranks of a TP group."""

    layout: SequenceLayout
    group: TPGroup


@dataclass(frozen=True, slots=True)
class HeadProduct:
    """The logits x w' + b, [..., V/R], before they are formed.

    x         [..., H], whose gradient something before it sums over the ranks; with ``tokens_of``,
              this rank's shard of the tokens, whose gradient is this rank's of the sum
    weight    [V/R, H], this rank's rows
    bias      [V/R], or None
    dtype     that the product is formed in, under autocast another than those of the factors
    tokens    of a chunk, the same on every rank
    sample    some of the weight's values
    tokens_of how the tokens are sharded, or None
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    tokens: int
    sample: Tensor
    tokens_of: ShardedTokens | None = None

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.x.shape if self.tokens_of is None else self.tokens_of.layout.full_shape(self.x)
        return (*shape[:-1], self.weight.shape[0])

    @property
    def requires_grad(self) -> bool:
        return any(x.requires_grad for x in self._factors())

    @property
    def version(self) -> int:
        """A number that every write to a factor in place increases."""
        return sum(version_counter(x) for x in self._factors())

    @property
    def is_gone(self) -> bool:
        """Whether the weight has other values, or no memory. DeepSpeed writes to parameters without
        a new version, and fully_shard takes their memory after a forward."""
        if self.weight.numel() == 0:
            return False
        has_memory = self.weight.untyped_storage().nbytes() > 0
        return not (has_memory and torch.equal(sample_of(self.weight), self.sample))

    @property
    def chunk_bytes(self) -> int:
        """Of the logits that are there at once where a loss is formed."""
        return self.tokens * self.weight.shape[0] * self.dtype.itemsize

    def formed(self) -> Tensor:
        """The logits."""
        kind = self.x.device.type
        is_cast = any(x.dtype != self.dtype for x in self._factors())
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(kind, dtype=self.dtype if is_cast else None, enabled=is_cast),
        ):
            x, tokens = self.x, self.tokens_of
            if tokens is not None:
                x = with_summed_gradient(x, tokens.layout, tokens.group)
            return F.linear(x, self.weight, self.bias)

    def _factors(self) -> tuple[Tensor, ...]:
        return (self.x, self.weight) if self.bias is None else (self.x, self.weight, self.bias)


def may_defer_product(head: nn.Module) -> bool:
    """Whether the weight of ``head`` will be there after its forward, as far as is known before."""
    return (
        torch.is_grad_enabled()
        and not is_managed_by_fsdp(head)
        and not any(p is not None and is_partitioned(p) for p in own_parameters(head).values())
    )


def deferred_product(head: nn.Module, model: nn.Module, x: Tensor) -> HeadProduct | None:
    """The product of ``head``, a sharded linear layer, with ``x``, to be formed later in the
    forward of ``model``, or after it; None without gradients, where that saves no memory, or where
    the weight would be gone by then."""
    weight, bias = (own_parameters(head).get(name) for name in ("weight", "bias"))
    if weight is None or type(weight) not in (Tensor, nn.Parameter) or is_partitioned(weight):
        return None
    # What was computed without gradients is often kept over a step, which changes the weights.
    if not torch.is_grad_enabled():
        return None
    if is_managed_by_fsdp(head) and not stays_gathered(head, model):
        return None
    sharding = sharding_of(head)
    dtype, widths = compute_dtype(x), sharding.layout.widths
    is_cast = torch.is_autocast_enabled(x.device.type)
    given = {x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype}
    fitting = _CPU_DTYPES if x.device.type == "cpu" else _DTYPES
    if dtype not in fitting or given - (_CAST if is_cast else {dtype}):
        return None
    tokens, hidden = chunk_tokens(widths, x.device), x.shape[-1]
    # The gradient of a weight in 16 bits is summed in float32.
    kept = (
        hidden * torch.float32.itemsize if weight.requires_grad and weight.dtype in _16_BITS else 0
    )
    count = x.numel() // max(hidden, 1)
    if (count - tokens) * dtype.itemsize <= kept:
        return None
    lazy, sample = own_tokens(x), sample_of(weight)
    if lazy is not None:
        tokens_of = ShardedTokens(lazy.layout_of_shard, lazy.group)
        return HeadProduct(lazy.shard, weight, bias, dtype, tokens, sample, tokens_of)
    own = sharding.context.input.shared(x, siblings=sharding.siblings)
    return HeadProduct(own, weight, bias, dtype, tokens, sample)


def sample_of(weight: Tensor) -> Tensor:
    """A row and a column of ``weight``, copied."""
    return torch.cat([weight.detach()[0], weight.detach()[:, 0]]) if weight.numel() else weight


def chunk_tokens(widths: tuple[int, ...], device: torch.device) -> int:
    """Tokens whose logits are formed at once, the same number on every rank; ``widths`` are the
    columns of each."""
    is_cpu = device.type == "cpu"
    tokens, size = (_CPU_TOKENS, _CPU_BYTES) if is_cpu else (_DEVICE_TOKENS, _DEVICE_BYTES)
    return max(tokens, size // (max(widths) * torch.float32.itemsize))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The data type of a product with ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def mm_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32: sums of products that were rounded to 16 bits would bias the training."""
    if a.dtype in _16_BITS and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a' b; a total in float32 of factors in 16 bits is formed some rows at a time."""
    if a.dtype == total.dtype:
        total.addmm_(a.t(), b)
        return
    for rows in _rows_of(total):
        total[rows] += mm_in_float32(a[:, rows].t(), b)


def _rows_of(total: Tensor) -> Iterator[slice]:
    size = _CPU_BYTES if total.device.type == "cpu" else _DEVICE_BYTES
    step = max(1, size // (max(total.shape[1], 1) * total.dtype.itemsize))
    for first in range(0, total.shape[0], step):
        yield slice(first, first + step)
