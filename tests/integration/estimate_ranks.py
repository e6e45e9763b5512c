# SPDX-License-Identifier: Apache-2.0
"""Run on every rank by tests.integration.test_estimate."""

import gc
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import deepspeed_autotp
from deepspeed_autotp.interop.named_model import named_model

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def nbytes(tensors: Iterable[Any]) -> int:
    """Bytes of the storages of tensors, each once."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def storages(tensors):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def live():
    gc.collect()
    found = {}
    for o in gc.get_objects():
        try:
            if isinstance(o, Tensor) and o.device.type == "cpu":
                s = o.untyped_storage()
                if s.nbytes():
                    found.setdefault(s.data_ptr(), (s.nbytes(), str(o.dtype), tuple(o.shape)))
        except Exception:
            pass
    return found


def measure(text: str, tp: int, zero: int, dtype: str, settings: Any = None) -> dict[str, Any]:
    torch.manual_seed(0)
    meta = named_model(text, dtype=DTYPES[dtype])
    model = type(meta)(meta.config).to(DTYPES[dtype])
    before = live()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": zero, "reduce_bucket_size": 1000, **(settings or {})},
        "tensor_parallel": {"autotp_size": tp, "self_check": False},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    engine, *_ = deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)
    ids = torch.arange(8).reshape(1, 8)
    inputs = {"input_ids": ids, "labels": ids}
    out = []
    for step in range(2):
        loss = engine(**inputs).loss
        engine.backward(loss)
        del loss
        found = live()
        done = set()

        def take(name, tensors):
            s = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors
                if isinstance(t, Tensor)
            }
            n = sum(v for k, v in s.items() if k not in done)
            done.update(s)
            return name, n

        ps = list(model.parameters())
        z = engine.optimizer
        inner = getattr(z, "optimizer", z)
        masters = [p for g in inner.param_groups for p in g["params"]]
        report = dict(
            [
                take(
                    "parameters",
                    [p.data for p in ps if not hasattr(p, "ds_tensor")]
                    + [p.ds_tensor for p in ps if hasattr(p, "ds_tensor")],
                ),
                take("persistent", [p.data for p in ps]),
                take("buffers", model.buffers()),
                take("master", masters + list(getattr(z, "fp32_partitioned_groups_flat", []))),
                take(
                    "states",
                    [
                        t
                        for s in inner.state.values()
                        for t in s.values()
                        if isinstance(t, Tensor) and t.dim() > 0
                    ],
                ),
                take(
                    "steps",
                    [
                        t
                        for s in inner.state.values()
                        for t in s.values()
                        if isinstance(t, Tensor) and t.dim() == 0
                    ],
                ),
                take("p.grad", [p.grad for p in ps]),
                take("master.grad", [p.grad for p in masters]),
                take("grad_accum", [getattr(p, "grad_accum", None) for p in ps]),
                take(
                    "averaged",
                    [
                        t
                        for l in getattr(z, "averaged_gradients", {}).values()
                        if l is not None
                        for t in l
                    ]
                    if hasattr(z, "averaged_gradients")
                    else [],
                ),
                take(
                    "all_grad",
                    [
                        t
                        for l in getattr(z, "all_grad_tensors", {}).values()
                        if l is not None
                        for t in l
                    ]
                    if hasattr(z, "all_grad_tensors")
                    else [],
                ),
                take("z3flat", [getattr(z, "grad_partitions_flat_buffer", None)]),
                take(
                    "ipg",
                    [
                        t
                        for b in getattr(z, "ipg_buckets", {}).values()
                        for t in (b.buffer if isinstance(b.buffer, list) else [b.buffer])
                    ]
                    if hasattr(z, "ipg_buckets")
                    else [],
                ),
            ]
        )
        rest = {k: v for k, v in found.items() if k not in done and k not in before}
        report["rest"] = sorted(rest.values(), key=lambda v: -v[0])[:6]
        report["engine"] = type(z).__name__
        report["local"] = sum(getattr(p, "ds_numel", p.numel()) for p in ps)
        report["count"] = len(ps)
        out.append(report)
        engine.step()
    after = {}
    deepspeed_autotp_destroy = getattr(engine, "destroy", None)
    if deepspeed_autotp_destroy:
        engine.destroy()
    return out[-1]


def sweep(text, tp, settings):
    return {
        (zero, dtype): measure(text, tp, zero, dtype, settings)
        for dtype in ("fp32", "bf16")
        for zero in (0, 1, 2, 3)
    }
