# SPDX-License-Identifier: Apache-2.0
"""The Trainer of transformers under tensor parallelism: it sees replicas, as Accelerate does.

Some of its formulas divide by the TP size what they have gathered from all ranks; what is gathered
of replicas needs no division, so that its TP size is 1.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from deepspeed_autotp.interop.accelerate_replicas import (
    configured_tp_size,
    of_ranks,
    seeing_ranks,
    tp_size,
    with_flag,
)
from deepspeed_autotp.interop.replaced import Replaced
from deepspeed_autotp.interop.versions import required

_required = functools.partial(required, project="transformers", needed_for="install()")

# Methods whose process_index is that of the replica: they draw and seed data.
_OF_DATA = ("_get_train_sampler", "_get_dataloader")
# Methods that are about processes and their files.
_OF_PROCESSES = ("_save_rng_state", "_load_rng_state")
Configured = Callable[[Any, int], None]
_sees_replica: ContextVar[bool] = ContextVar("autotp_sees_replica", default=False)


def see_replicas_in_trainer(replaced: Replaced, *, configured: Configured) -> None:
    """Let the Trainer and its arguments count replicas where their DeepSpeed configuration has a
    TP size. ``configured`` is called with arguments for DeepSpeed and their TP size, when they are
    made and when a Trainer is."""
    trainer = importlib.import_module("transformers.trainer")
    arguments = importlib.import_module("transformers.training_args").TrainingArguments
    engine = importlib.import_module("transformers.integrations.deepspeed")
    for name, ours in (("world_size", _world_size), ("process_index", _process_index)):
        original = vars(arguments)[name].fget
        replaced.put(arguments, name, property(functools.partial(ours, original)))
    first = arguments.main_process_first
    replaced.put(arguments, "main_process_first", _context_of_ranks(first))
    process = engine.HfTrainerDeepSpeedConfig.trainer_config_process
    replaced.put(
        engine.HfTrainerDeepSpeedConfig,
        "trainer_config_process",
        _processed(of_ranks(process), configured),
    )

    cls = trainer.Trainer
    size = _required(cls, "get_tp_size")
    replaced.put(cls, "get_tp_size", lambda self: size(self) if _tp_size(self.args) == 1 else 1)
    for name in _OF_DATA:
        replaced.put(cls, name, with_flag(_sees_replica, _required(cls, name)))
    for name in _OF_PROCESSES:
        replaced.put(cls, name, of_ranks(_required(cls, name)))
    make = _required(cls, "create_accelerator_and_postprocess")
    replaced.put(cls, "create_accelerator_and_postprocess", _made(make, configured))
    scalars = _required(trainer, "distributed_broadcast_scalars")
    replaced.put(trainer, "distributed_broadcast_scalars", functools.partial(_scalars, scalars))


def _tp_size(arguments: Any) -> int:
    own = getattr(arguments, "hf_deepspeed_config", None)
    return configured_tp_size(getattr(own, "config", None))


def _world_size(original: Callable[[Any], int], arguments: Any) -> int:
    return max(1, original(arguments) // _tp_size(arguments))


def _process_index(original: Callable[[Any], int], arguments: Any) -> int:
    return original(arguments) // (_tp_size(arguments) if _sees_replica.get() else 1)


def _processed(process: Callable[..., Any], configured: Configured) -> Callable[..., Any]:
    @functools.wraps(process)
    def call(self: Any, arguments: Any, *args: Any, **kwargs: Any) -> Any:
        result = process(self, arguments, *args, **kwargs)
        configured(arguments, configured_tp_size(self.config))
        return result

    return call


def _made(make: Callable[..., Any], configured: Configured) -> Callable[..., Any]:
    @functools.wraps(make)
    def call(self: Any) -> Any:
        # The arguments may have been made before install().
        configured(self.args, _tp_size(self.args))
        return make(self)

    return call


def _context_of_ranks(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    @contextmanager
    def call(*args: Any, **kwargs: Any) -> Iterator[None]:
        with seeing_ranks(), method(*args, **kwargs):
            yield

    return call


def _scalars(
    original: Callable[..., Any],
    scalars: Any,
    num_total_examples: int | None = None,
    device: Any = "cuda",
) -> Any:
    if tp_size() == 1:
        return original(scalars, num_total_examples, device)
    gather = importlib.import_module("accelerate.utils").gather
    return gather(torch.tensor(scalars, device=device))[:num_total_examples]
