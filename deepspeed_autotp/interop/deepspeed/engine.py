# SPDX-License-Identifier: Apache-2.0
"""The arguments and the configuration of DeepSpeed's engine, and its AutoTP mode."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from deepspeed_autotp.interop.deepspeed.loss_scale import refuse_wrong_loss_scale
from deepspeed_autotp.interop.deepspeed.module import deepspeed_module
from deepspeed_autotp.interop.versions import required


def refuse_engine_record() -> None:
    """ValueError where DeepSpeed's own ``tp_model_init`` was called: its ``initialize`` would
    shard by DeepSpeed's rules what ours has not sharded."""
    recorded = importlib.import_module("deepspeed.runtime.tensor_parallel.init_utils")
    name = "_TP_MODEL_INIT_ARGS"
    if required(recorded, name, project="deepspeed", needed_for="initialize") is not None:
        raise ValueError(
            "deepspeed.tp_model_init was called, expected deepspeed_autotp.tp_model_init; "
            "call that one, or deepspeed_autotp.install() first"
        )


def config_argument(args: Any, config: Any, config_params: Any) -> Any:
    """The configuration, from whichever argument of ``deepspeed.initialize`` has it."""
    passed = config if config is not None else config_params
    named = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    if passed is not None and named is not None:
        raise ValueError(
            f"initialize: got both args.deepspeed_config, {named!r}, and config, expected one; "
            "leave one of them out"
        )
    if passed is None and named is None:
        raise ValueError(
            "initialize: config: got None, expected a configuration; pass config=..., or args with "
            "deepspeed_config"
        )
    return named if passed is None else passed


def engine_initialize() -> Callable[..., Any]:
    """DeepSpeed's own ``initialize``, also after ``install`` has replaced it."""
    found = deepspeed_module().initialize
    original: Callable[..., Any] = getattr(found, "deepspeed_original", found)
    return original


def without_config(args: Any) -> Any:
    """``args`` without a configuration: DeepSpeed refuses one there beside ours."""
    if args is None:
        return None
    bare = copy.copy(args)
    for name in ("deepspeed_config", "deepscale_config"):
        if hasattr(bare, name):
            setattr(bare, name, None)
    return bare


def refuse_pipeline(model: nn.Module) -> None:
    """ValueError for DeepSpeed's pipeline modules."""
    if isinstance(model, deepspeed_module().PipelineModule):
        raise ValueError(
            "tensor parallelism of a PipelineModule is not supported; pass a model without "
            "pipeline parallelism, or set tensor_parallel.autotp_size to 0"
        )


_BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def settle_engine_config(config: dict[str, Any], *, mpu: Any, replicas: int) -> Any:
    """Let DeepSpeed check its configuration before anything is sharded, and settle batch sizes.
    Returns what DeepSpeed made of it.

    DeepSpeed checks ``train_batch_size`` against all ranks, and ZeRO 3 again against the
    data-parallel ranks only, so that both checks cannot pass. Without the key, with the micro
    batch size and the accumulation steps in its place, they do. So does one that counts over the
    ``replicas``, where all three are given.
    """
    sizes = [config.get(key) for key in _BATCH]
    known = [size for size in sizes if type(size) is int]
    if len(known) == len(sizes) and config.get("train_batch_size") == math.prod(known) * replicas:
        del config["train_batch_size"]
    try:
        checked = deepspeed_module().DeepSpeedConfig(config, mpu)
    except Exception as error:  # assertions, pydantic's errors and DeepSpeed's own
        raise ValueError(f"DeepSpeed refuses the configuration: {error}") from error
    refuse_wrong_loss_scale(checked)
    config.pop("train_batch_size", None)
    for key in _BATCH:
        config[key] = getattr(checked, key)
    return checked


def gather_weights_on_save(config: dict[str, Any]) -> None:
    """Let ``save_16bit_model`` and ``Trainer.save_model`` gather full weights.

    DeepSpeed gathers over the TP group only with a key of ZeRO 3, which is false by default;
    without it saving fails. A value of the user is kept, also under the key's old name.
    """
    zero = config.setdefault("zero_optimization", {})
    if isinstance(zero, dict) and "stage3_gather_fp16_weights_on_model_save" not in zero:
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)


def skip_everything(config: dict[str, Any]) -> None:
    """Let DeepSpeed's engine shard nothing, and tell its own layers of the model what they ask."""
    rule = {"patterns": [".*"], "partition_type": "skip"}
    rules = {"use_default_specs": False, "layer_specs": [rule]}
    config["tensor_parallel"]["partition_config"] = rules


def optimizer_type(config: Mapping[str, Any]) -> str | None:
    """The optimizer that a configuration names."""
    section = config.get("optimizer")
    found = section.get("type") if isinstance(section, Mapping) else None
    return found if isinstance(found, str) else None


def has_stepped(optimizer: Any) -> bool:
    """Whether an optimizer holds state for any parameter."""
    return bool(getattr(optimizer, "state", None))


def on_destroy(engine: Any, then: Callable[[], None]) -> None:
    """Call ``then`` after ``engine.destroy()``, which the engine's own ``__del__`` calls as well.

    Not then: Python collects an engine at another time on each rank.
    """
    destroy = engine.destroy

    def destroy_all() -> None:
        frame = inspect.currentframe()
        caller = None if frame is None else frame.f_back
        try:
            destroy()
        finally:
            if caller is None or caller.f_code.co_name != "__del__":
                then()

    engine.destroy = destroy_all


def enter_in_calls(engine: Any, context: AbstractContextManager[None]) -> None:
    """Let each backward pass and step of ``engine``, and what it saves and loads, be within
    ``context``."""

    def within(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def entered(*args: Any, **kwargs: Any) -> Any:
            with context:
                return call(*args, **kwargs)

        return entered

    for name in ("backward", "step", "save_checkpoint", "load_checkpoint", "save_16bit_model"):
        setattr(engine, name, within(getattr(engine, name)))


def drop_batch_comparison(engine: Any) -> None:
    """Remove DeepSpeed's comparison of the first batches, which pickles all arguments of the
    forward, and lets TP rank 0 go on where they differ."""
    comparison = getattr(engine, "first_dataloader_check", None)
    if comparison is not None:
        comparison.remove()
        engine.first_dataloader_check = None


def set_engine_mode(*, training: bool) -> None:
    """DeepSpeed's AutoTP mode; nothing without DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is not None:
        deepspeed_module().module_inject.set_autotp_mode(training=training)


def engine_mode_is_training() -> bool:
    """DeepSpeed's AutoTP mode; without DeepSpeed there is only training."""
    if importlib.util.find_spec("deepspeed") is None:
        return True
    layers = importlib.import_module("deepspeed.module_inject.layers")
    return bool(layers.is_autotp_training_mode())
