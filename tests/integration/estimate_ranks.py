# SPDX-License-Identifier: Apache-2.0
"""Run on every rank by tests.integration.test_estimate."""

import ctypes
import gc
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed_autotp
from benchmarks.step_calls import SHARED_MEMORY, Recorder
from deepspeed_autotp import _core
from deepspeed_autotp.estimate.step_recorder import StepRecorder, stacks_of
from deepspeed_autotp.interop.named_model import named_model
from deepspeed_autotp.interop.transformers import model_facts

SMALLEST = (
    "llama:hidden_size=64,intermediate_size=96,num_hidden_layers=1,num_attention_heads=8,"
    "num_key_value_heads=2,vocab_size=100"
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Small enough for tensors of a tiny model to be on both sides of them.
ZERO = {
    "reduce_bucket_size": 5000,
    "stage3_param_persistence_threshold": 200,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


class _Sizes:
    """Bytes of storages, of which each is counted once, in the order in which they are asked."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def take(self, tensors: Iterable[Any]) -> int:
        found = {}
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.dim() > 0:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        new = {key: size for key, size in found.items() if key not in self._seen and size}
        self._seen.update(new)
        return sum(new.values())


def _model(text: str, dtype: str) -> nn.Module:
    torch.manual_seed(0)
    meta = named_model(text, dtype=DTYPES[dtype])
    return type(meta)(meta.config).to(DTYPES[dtype]).train()


def _inputs(model: nn.Module, rows: int, length: int) -> dict[str, Any]:
    ids = torch.arange(rows * length).reshape(rows, length) % 90
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


def held(
    models: Sequence[str], tp: int, cases: Sequence[tuple[int, str]]
) -> list[list[dict[str, int]]]:
    """What DeepSpeed holds of each model between backward and step, by stage and data type."""
    return [[_held(text, tp, stage, dtype) for stage, dtype in cases] for text in models]


def _engine(text: str, tp: int, stage: int, dtype: str) -> Any:
    model = _model(text, dtype)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, **ZERO},
        "tensor_parallel": {"autotp_size": tp, "self_check": False},
        "gradient_clipping": 0.0,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return deepspeed_autotp.initialize(model=model, optimizer=optimizer, config=config)[0]


def _held(text: str, tp: int, stage: int, dtype: str) -> dict[str, int]:
    engine = _engine(text, tp, stage, dtype)
    inputs = _inputs(engine.module, 1, 8)
    engine.backward(engine(**inputs).loss)
    engine.step()  # from the second step on everything is there
    engine.backward(engine(**inputs).loss)
    found = _kinds(engine)
    engine.step()
    engine.destroy()
    return found


def _kinds(engine: Any) -> dict[str, int]:
    sizes, zero = _Sizes(), vars(engine.optimizer)
    parameters = list(engine.module.parameters())
    partitions = [vars(p)["ds_tensor"] for p in parameters if "ds_tensor" in vars(p)]
    inner = zero.get("optimizer", engine.optimizer)
    masters = [p for group in inner.param_groups for p in group["params"]]
    masters += zero.get("fp32_partitioned_groups_flat", [])
    averaged = [v for v in zero.get("averaged_gradients", {}).values() if v is not None]
    own = sizes.take(partitions or [p.data for p in parameters])
    return {
        "parameters": own,
        "gathered": sizes.take(p.data for p in parameters),
        "master": sizes.take(masters),
        "states": sizes.take(t for state in inner.state.values() for t in state.values()),
        # Without ZeRO by their sizes: that of a sharded embedding has a row that is not read.
        "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None)
        + sizes.take(t for tensors in averaged for t in tensors),
    }


Recorded = tuple[tuple[int, int], int, dict[tuple[str, int], int]]


def recorded(
    models: Sequence[str], dtype: str, rows: int, length: int, section: dict[str, Any]
) -> list[Recorded]:
    """Of a real step of each model over all ranks: (activations, gradients) where most activations
    are alive, what is saved for the backward pass, and how often which collective was called."""
    return [_recorded(text, dtype, rows, length, section) for text in models]


def _recorded(text: str, dtype: str, rows: int, length: int, section: dict[str, Any]) -> Recorded:
    model = _model(text, dtype)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=section)
    inputs = _inputs(model, rows, length)
    for _ in range(4):  # in calls 1, 2 and 4 the ranks compare what they have
        model(**inputs).loss.backward()
    model.zero_grad()
    with Recorder() as recorder:
        model(**inputs).loss.backward()
    model.zero_grad()
    step = StepRecorder(model, stacks_of(model), model_facts(model).output_head).run(inputs)
    parts = [(part.end, part.moments, 1) for part in step.parts]
    calls = Counter((call.kind, call.size) for call in recorder.calls)
    return _core.timeline_peak(parts, 0.0), step.saved, dict(calls)


def sent_to_replicas(text: str, tp: int, stage: int) -> dict[str, int]:
    """Bytes of a step's collectives over the data-parallel ranks, by kind."""
    engine = _engine(text, tp, stage, "bf16")
    inputs = _inputs(engine.module, 1, 8)
    for _ in range(2):
        engine.backward(engine(**inputs).loss)
        engine.step()
    with Recorder() as recorder:
        engine.backward(engine(**inputs).loss)
        engine.step()
    engine.destroy()
    found: Counter[str] = Counter()
    for call in recorder.calls:
        if call.transport != SHARED_MEMORY:
            found[call.kind] += call.size
    return dict(found)


def resident(text: str, tp: int, rows: int, length: int) -> int:
    """Bytes by which the resident memory of this process grows for an engine, at the peak of a step
    without ZeRO in float32."""
    # Freed tensors go back to the machine at once (M_MMAP_THRESHOLD).
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    _step(_engine(SMALLEST, tp, 0, "fp32"), 1, 8)  # what is imported and made once
    gc.collect()
    before = _status("VmRSS")
    engine = _engine(text, tp, 0, "fp32")
    for _ in range(2):
        _step(engine, rows, length)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    _step(engine, rows, length)
    return _status("VmHWM") - before


def _step(engine: Any, rows: int, length: int) -> None:
    loss = engine(**_inputs(engine.module, rows, length)).loss
    engine.backward(loss)
    engine.step()


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
