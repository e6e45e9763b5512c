# SPDX-License-Identifier: Apache-2.0
"""Statistics of tokens from the shards of an output head."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deepspeed_autotp.vocab_parallel import chunked_head
from deepspeed_autotp.vocab_parallel.chunked_head import HeadTask, token_statistics
from tests.support.column_shards import even_widths, layout_of, own_columns, world_group
from tests.support.peak_memory import PeakMemory
from tests.support.recorded_collectives import recorded_collectives

TOKENS, HIDDEN, SIZE = 11, 6, 29


def drawn(dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, HIDDEN, generator=draw).to(dtype)
    w = torch.randn(SIZE, HIDDEN, generator=draw).to(dtype)
    b = torch.randn(SIZE, generator=draw).to(dtype) if bias else None
    labels = torch.randint(0, SIZE, (TOKENS,), generator=draw)
    # A label that is the largest, and one that ties with an earlier column.
    labels[0] = int((x[0] @ w.T + (0 if b is None else b)).argmax())
    w[20] = w[4]
    if b is not None:
        b[20] = b[4]
    x[1] = 5 * w[4]
    labels[1] = 20
    return x, w, b, labels


def expected(
    x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, options: dict[str, float]
) -> tuple[Tensor, ...]:
    """The same from full logits."""
    z = F.linear(x, w, b).float() * options.get("scale", 1.0)
    cap = options.get("soft_cap", 0.0)
    z = (torch.tanh(z / cap) * cap if cap else z) / options.get("temperature", 1.0)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    return (
        log_p.gather(1, labels.unsqueeze(1)).squeeze(1),
        -(p * log_p).sum(-1),
        p.square().sum(-1).log().detach(),
        z.mean(-1).detach(),
        z.argmax(-1) == labels,
    )


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, of the largest number."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6))


def against_full(
    name: str, bias: bool, options: dict[str, float], used: str, tile: int
) -> dict[str, Any]:
    """Errors of the fields and gradients; ``used`` names the fields that a loss is formed from."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    x, w, b, labels = drawn(dtype, bias)
    layout, group = layout_of(even_widths(SIZE)), world_group()
    exact = [None if t is None else t.float().clone().requires_grad_() for t in (x, w, b)]
    assert exact[0] is not None and exact[1] is not None
    wanted = expected(exact[0], exact[1], exact[2], labels, options)
    own_w = own_columns(w.T, layout).detach().T.contiguous().requires_grad_()
    own_b = None if b is None else own_columns(b, layout)
    x = x.clone().requires_grad_()
    before = chunked_head._CPU_TILE, chunked_head._TOKENS
    chunked_head._CPU_TILE, chunked_head._TOKENS = tile, 4
    try:
        with recorded_collectives() as calls:
            got = token_statistics(x, own_w, own_b, labels, HeadTask(layout, group, **options))
            loss = torch.zeros(())
            for weight, key in enumerate(used.split(), 1):
                index = ("log_probs", "entropy").index(key)
                fields = (got.log_probs, got.entropy)
                drawn_weights = torch.linspace(-1, 2, TOKENS) * weight
                loss = loss + (fields[index] * drawn_weights).sum()
                exact_loss = (wanted[index] * drawn_weights).sum()
                exact_loss.backward(retain_graph=True)
            loss.backward()
    finally:
        chunked_head._CPU_TILE, chunked_head._TOKENS = before
    fields = (got.log_probs, got.entropy, got.log_sum_sq_probs, got.mean_logits)
    errors = [apart(a.detach(), c.detach()) for a, c in zip(fields, wanted[:4], strict=True)]
    full_grads = [None if t is None else t.grad for t in exact]
    assert x.grad is not None and own_w.grad is not None
    assert full_grads[0] is not None and full_grads[1] is not None
    errors += [
        apart(x.grad, full_grads[0]),
        apart(own_w.grad, own_columns(full_grads[1].T, layout, leaf=False).T),
    ]
    if own_b is not None and own_b.grad is not None and full_grads[2] is not None:
        errors.append(apart(own_b.grad, own_columns(full_grads[2], layout, leaf=False)))
    bits = [float(t.detach().double().sum()) for t in fields]
    return {
        "errors": errors,
        "top1": torch.equal(got.is_top1, wanted[4]) or name == "bfloat16",
        "bits": (*bits, float(x.grad.double().sum())),
        "calls": [(kind, size) for kind, size in calls],
    }


def frozen() -> tuple[bool, int]:
    """A head that is not trained, as with LoRA: its gradient is not formed."""
    x, w, _, labels = drawn(torch.float32, False)
    layout = layout_of(even_widths(SIZE))
    own = own_columns(w.T, layout).detach().T.contiguous()
    x = x.clone().requires_grad_()
    with recorded_collectives() as calls:
        task = HeadTask(layout, world_group())
        token_statistics(x, own, None, labels, task).log_probs.sum().backward()
    return own.grad is None and x.grad is not None, len(calls)


def peak() -> float:
    """Most memory of a step, of that of this rank's logits."""
    width, tokens = 131072, 512
    layout = layout_of(even_widths(width))
    own = torch.zeros(layout.widths[dist.get_rank()], 8)
    x = torch.zeros(tokens, 8, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64)
    with PeakMemory() as memory:
        task = HeadTask(layout, world_group())
        token_statistics(x, own, None, labels, task).log_probs.sum().backward()
        return memory.most / (tokens * own.shape[0] * 4)


def trl_kernel(tied_to: str) -> dict[str, float]:
    """What TRL's own kernel says of the full weight, and what ours says in its place."""
    from trl.kernels import ChunkedLogProbFunction

    from deepspeed_autotp.interop.trl import _Kernel
    from deepspeed_autotp.vocab_parallel.gathered_weight import statistics_of_shard

    x, w, b, labels = drawn(torch.float32, True)
    x.requires_grad_()
    given = (x, w, b, labels, 0.7, 16, 3.0, 0.5, tuple(tied_to.split()))
    kernel = _Kernel(ChunkedLogProbFunction, statistics_of_shard)
    plain = kernel.apply(*given)  # a weight that is not sharded
    theirs = ChunkedLogProbFunction.apply(*given)
    same = all(
        (a is None and c is None) or torch.equal(a, c) for a, c in zip(plain, theirs, strict=True)
    )
    layout = layout_of(even_widths(SIZE))
    own_w = own_columns(w.T, layout).detach().T.contiguous()
    assert b is not None
    task = HeadTask(layout, world_group(), 0.7, 3.0, 0.5)
    ours = token_statistics(x, own_w, own_columns(b, layout), labels, task)
    fields = (ours.log_probs, ours.entropy, ours.log_sum_sq_probs, ours.mean_logits, ours.is_top1)
    errors = [
        apart(a.detach(), c.detach()) for a, c in zip(fields, theirs, strict=True) if c is not None
    ]
    return {"same": float(same), "apart": max(errors), "fields": len(errors)}
