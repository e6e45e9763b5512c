# SPDX-License-Identifier: Apache-2.0
"""What is trained in the place of a model that a user names: its twin, or else the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp._core import Plan
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.interop.labels import with_labels
from deepspeed_autotp.interop.named_model import named_model
from deepspeed_autotp.interop.small_config import is_configured, small_model
from deepspeed_autotp.interop.transformers import token_inputs
from deepspeed_autotp.planning.model_description import Description, describe
from deepspeed_autotp.planning.planner import PlanRequest, decided, large_names, make_plan
from deepspeed_autotp.self_check.inferred_inputs import inferred_inputs
from deepspeed_autotp.self_check.inputs import Inputs
from deepspeed_autotp.self_check.isolation import seeded
from deepspeed_autotp.self_check.twin import find_twin

_CPU = torch.device("cpu")
# A model without a twin is trained at its full size, once more on every rank.
_LARGEST = 150_000_000


@dataclass(frozen=True, slots=True)
class Subject:
    """How other processes make the same model: of the class of the model that ``text`` names with
    ``config``, or without one what its factory gives. It has ``values`` and ``buffers``, by the
    order of the parameters and by name, of which ``trains`` train; ``inputs`` are what it takes.
    It is to be sharded by ``settings``. ``large_names``, as in a PlanRequest, are those of the
    model of which it is the twin.
    """

    text: str
    config: Any
    dtype: torch.dtype
    values: list[Tensor]
    buffers: dict[str, Tensor]
    trains: list[bool]
    inputs: Inputs
    settings: TPTrainingConfig
    large_names: tuple[str, ...] | None

    @property
    def is_twin(self) -> bool:
        """Whether it stands for a larger model."""
        return self.large_names is not None

    def made(self) -> nn.Module:
        """The model, with its values."""
        with seeded():
            model = _made(self.text, self.config)
        description = describe(model)
        for parameter, trains in zip(description.parameters, self.trains, strict=True):
            parameter.requires_grad_(trains)
        model = model.to(self.dtype).train()
        with torch.no_grad():
            for parameter, value in zip(describe(model).parameters, self.values, strict=True):
                parameter.copy_(value)
            for name, buffer in model.named_buffers():
                buffer.copy_(self.buffers[name])
        return model


class NoPlan(ValueError):
    """There is such a model, and it cannot be sharded so."""


def find_subject(
    text: str,
    named: nn.Module,
    settings: TPTrainingConfig,
    *,
    ranks: int,
    dtype: torch.dtype,
    given: Mapping[str, object] | None = None,
) -> tuple[Subject, nn.Module]:
    """What stands for ``named``, the model that ``text`` names, and that model.

    ``given`` are keyword arguments for the model itself, which has no twin then. NoPlan where it
    cannot be sharded. ValueError where it has no twin and is too large itself, or its inputs are
    not known.
    """
    description = describe(named)
    try:
        plan = make_plan(description, settings, ranks=ranks)
    except ValueError as error:
        raise NoPlan(str(error)) from error
    large = large_names(plan)
    settings = decided(settings, plan)

    def plan_of_twin(small: Description) -> Plan:
        return make_plan(small, settings, ranks=ranks, request=PlanRequest(large_names=large))

    twin = find_twin(description, plan, plan_of_twin, _CPU) if given is None else None
    if twin is None:
        model, inputs = _itself(text, named, given, dtype)
        return _subject(text, model, inputs, dtype, settings, None), model
    model = twin.description.modules[""]
    return _subject(text, model, twin.inputs, dtype, settings, large), model


def _itself(
    text: str, named: nn.Module, given: Mapping[str, object] | None, dtype: torch.dtype
) -> tuple[nn.Module, Inputs]:
    elements = sum(p.numel() for p in named.parameters())
    name = type(named).__name__
    if elements > _LARGEST:
        raise ValueError(
            f"MODEL: {name} has {elements:,} parameters, and no small model of its class has a "
            f"plan like its; expected at most {_LARGEST:,}: name one with fewer layers and smaller "
            "widths, in a config.json or with overrides, or a factory that makes one"
        )
    with seeded():
        model = _made(text, named.config if is_configured(named) else None)
    values = given or token_inputs(model, device=_CPU) or inferred_inputs(model, device=_CPU)
    if values is None:
        raise ValueError(
            f"MODEL: the inputs of {name} are not known: its forward needs something other than "
            "token ids; pass --inputs module:function, which returns its keyword arguments"
        )
    values = {key: _as(value, dtype) for key, value in values.items()}
    return model, Inputs(values, with_labels(model, values), insist=True)


def _as(value: object, dtype: torch.dtype) -> object:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float and isinstance(value, Tensor) else value


def _made(text: str, config: Any) -> nn.Module:
    if config is None:
        return named_model(text, device="cpu").float()
    return small_model(named_model(text), config, device="cpu")


def _subject(
    text: str,
    model: nn.Module,
    inputs: Inputs,
    dtype: torch.dtype,
    settings: TPTrainingConfig,
    large: tuple[str, ...] | None,
) -> Subject:
    """``model`` gets the data type."""
    model.to(dtype).train()
    parameters: Sequence[nn.Parameter] = describe(model).parameters
    return Subject(
        text=text,
        config=model.config if is_configured(model) else None,
        dtype=dtype,
        values=[p.detach().clone() for p in parameters],
        buffers={name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        trains=[p.requires_grad for p in parameters],
        inputs=inputs,
        settings=settings,
        large_names=large,
    )
