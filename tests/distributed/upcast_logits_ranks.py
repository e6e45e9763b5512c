# SPDX-License-Identifier: Apache-2.0
"""Models in 16 bits that upcast their logits before the loss."""

import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import logit_forwards
from tests.support.output_head_models import batch, gradient_difference, shard
from tests.support.peak_memory import PeakMemory

# Its logits are most of a step's memory.
VOCABULARY = 4099


class _Hook(torch.autograd.Function):
    """As the hooks of ZeRO 3, which give another tensor over the same memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:  # type: ignore[override]
        return dx


def _replace(module: nn.Module, args: object, output: Tensor) -> Any:
    return _Hook.apply(output)  # type: ignore[no-untyped-call]


_replace.__module__ = "deepspeed.runtime.zero.parameter_offload"


def against_one_process(name: str, dtype: torch.dtype, is_hooked: bool) -> dict[str, Any]:
    """A step of a sharded model and of an unsharded one."""
    inputs = batch()
    unsharded, model = (logit_forwards.build(name, VOCABULARY).to(dtype) for _ in range(2))
    shard(model, "llama")
    if is_hooked:
        model.lm_head.register_forward_hook(_replace)
    expected, outputs = unsharded(**inputs), model(**inputs)
    difference = float((outputs.logits - expected.logits).abs().max().detach())
    dtypes = [tensor.dtype for tensor in (outputs.loss, outputs.logits, outputs.logits + 0)]
    for loss in (expected.loss, outputs.loss):
        loss.backward()
    return {
        "loss": abs(float((outputs.loss / expected.loss - 1).detach())),
        "gradients": gradient_difference(model, unsharded),
        "logits": difference,
        "dtypes": dtypes == [expected.loss.dtype, *[expected.logits.dtype] * 2],
    }


def memory() -> tuple[float, bool]:
    """The peak over that of a model that does not upcast; whether the shard is freed behind it."""
    most, freed = {}, []
    for name in ("Plain", "Upcast"):
        model = shard(logit_forwards.build(name, VOCABULARY).to(torch.bfloat16), "llama")
        model(**batch())  # compares the batches
        gc.collect()
        gc.disable()
        try:
            with PeakMemory() as peak:
                outputs = model(**batch())
                shard_of_logits = weakref.ref(outputs.logits._shard.untyped_storage())
                outputs.loss.backward()
            del outputs
            freed.append(shard_of_logits() is None)
        finally:
            gc.enable()
        most[name] = peak.most
    return most["Upcast"] / most["Plain"], all(freed)
