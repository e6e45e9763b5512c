# SPDX-License-Identifier: Apache-2.0
"""What the ranks do: one thing again and again, with samples of what they hold."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaForCausalLM

import deepspeed_autotp
from tests.support.engine_config import Setting, engine_config
from tests.support.pretrained_models import build_pretrained
from tests.support.raised_error import raised_error
from tests.support.resource_samples import Sample, sampled
from tests.support.small_models import build, tokens

Job = Callable[[int], object]
# One key/value head on several ranks: gradients are summed in subgroups, too.
SHAPE: dict[str, Any] = {"num_key_value_heads": 2, "attention_dropout": 0.1}
NO_RULES = {"partition_config": {"layer_specs": [], "use_default_specs": False}}


def repeat(name: str, times: int, warm: int) -> list[Sample]:
    """Samples of the resources of this rank."""
    with JOBS[name]() as job:
        return sampled(job, times=times, warm=warm)


def _made() -> nn.Module:
    return build("llama", tied=False, attn_implementation="eager", **SHAPE)


def _sharded() -> nn.Module:
    return deepspeed_autotp.parallelize(
        _made(), tp_size=dist.get_world_size(), config={"self_check": False}
    )


def _engine(zero: int = 1, precision: str = "bf16") -> Any:
    model = _made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    setting = Setting(dist.get_world_size(), zero, 1.0, precision, self_check=False)
    engine, *_ = deepspeed_autotp.initialize(
        model=model, optimizer=optimizer, config=engine_config(setting)
    )
    return engine


@contextmanager
def _steps() -> Iterator[Job]:
    model = _sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def job(number: int) -> None:
        ids = tokens(number)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    yield job


@contextmanager
def _engine_steps() -> Iterator[Job]:
    engine = _engine()

    def job(number: int) -> None:
        ids = tokens(number)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    yield job
    engine.destroy()


@contextmanager
def _models() -> Iterator[Job]:
    """Sharded, run once and dropped."""

    def job(number: int) -> None:
        ids = tokens(number)
        _sharded()(input_ids=ids, labels=ids).loss.backward()

    yield job


@contextmanager
def _checked_models() -> Iterator[Job]:
    """The same with a self-check, which makes a twin."""

    def job(number: int) -> None:
        deepspeed_autotp.parallelize(_made(), tp_size=dist.get_world_size())

    yield job


@contextmanager
def _refusals() -> Iterator[Job]:
    """Plans that are refused, each before or after the groups were made."""

    def job(number: int) -> None:
        config = NO_RULES if number % 2 else {"preset_model": "lama"}
        said = raised_error(
            lambda: deepspeed_autotp.parallelize(
                _made(), tp_size=dist.get_world_size(), config=config
            )
        )
        assert said.startswith("ValueError")

    yield job


@contextmanager
def _failed_steps() -> Iterator[Job]:
    """Forwards that end with an error of the model in the middle, on all ranks."""
    model = _sharded()
    failing = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(_fail)

    def job(number: int) -> None:
        said = raised_error(lambda: model(input_ids=tokens(number), labels=tokens(number)))
        assert said == "KeyError: 'in the middle'"

    yield job
    failing.remove()


def _fail(module: nn.Module, args: object) -> None:
    raise KeyError("in the middle")


@contextmanager
def _gathers() -> Iterator[Job]:
    model = _sharded()

    def job(number: int) -> None:
        with deepspeed_autotp.gather_params(model, modifier_rank=0 if number % 2 else None):
            pass

    yield job


@contextmanager
def _saves() -> Iterator[Job]:
    """``save_pretrained``, gathered and in parallel by turn, and ``from_pretrained``."""
    model = deepspeed_autotp.parallelize(
        build_pretrained("llama"), tp_size=dist.get_world_size(), config={"self_check": False}
    )
    with _common_folder() as folder:

        def job(number: int) -> None:
            deepspeed_autotp.save_pretrained(model, folder, parallel=number % 2 == 0)
            deepspeed_autotp.from_pretrained(
                LlamaForCausalLM,
                folder,
                tp_size=dist.get_world_size(),
                config={"self_check": False},
            )

        yield job


@contextmanager
def _checkpoints() -> Iterator[Job]:
    """``save_checkpoint`` and ``load_checkpoint`` of an engine."""
    engine = _engine()
    with _common_folder() as folder:

        def job(number: int) -> None:
            engine.save_checkpoint(folder, tag="last")
            engine.load_checkpoint(folder, tag="last")

        yield job
    engine.destroy()


@contextmanager
def _engines() -> Iterator[Job]:
    def job(number: int) -> None:
        engine = _engine(zero=(0, 1, 2)[number % 3])
        ids = tokens(number)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        engine.destroy()

    yield job


@contextmanager
def _common_folder() -> Iterator[str]:
    """A folder of rank 0, named to all ranks."""
    with tempfile.TemporaryDirectory(prefix="autotp-leaks-") as own:
        names = [own]
        dist.broadcast_object_list(names)
        yield names[0]
        dist.barrier()


JOBS = {
    "steps": _steps,
    "engine steps": _engine_steps,
    "models": _models,
    "checked models": _checked_models,
    "refusals": _refusals,
    "failed steps": _failed_steps,
    "gathers": _gathers,
    "saves": _saves,
    "checkpoints": _checkpoints,
    "engines": _engines,
}
