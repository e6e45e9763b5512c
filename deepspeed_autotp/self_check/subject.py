# SPDX-License-Identifier: Apache-2.0
"""What is trained in the place of a model that a user names: its twin, or else the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.interop.labels import with_labels
from deepspeed_autotp.interop.named_model import named_model
from deepspeed_autotp.interop.small_config import is_configured, small_model
from deepspeed_autotp.interop.transformers import token_inputs
from deepspeed_autotp.planning.model_description import Description, describe
from deepspeed_autotp.planning.planner import PlanRequest, large_names, make_plan
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
    """

    text: str
    is_twin: bool
    config: Any
    dtype: torch.dtype
    values: list[Tensor]
    buffers: dict[str, Tensor]
    trains: list[bool]
    inputs: Inputs

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


def find_subject(
    text: str, settings: TPTrainingConfig, *, ranks: int, dtype: torch.dtype
) -> tuple[Subject, nn.Module]:
    """What stands for the model that ``text`` names, and that model.

    ValueError where there is no such model, no plan for it, or neither a twin nor a model that is
    small enough and whose inputs are known.
    """
    named = named_model(text)
    description = describe(named)
    plan = make_plan(description, settings, ranks=ranks)

    def plan_of_twin(small: Description) -> Any:
        request = PlanRequest(large_names=large_names(plan))
        return make_plan(small, settings, ranks=ranks, request=request)

    twin = find_twin(description, plan, plan_of_twin, _CPU)
    if twin is not None:
        model = twin.description.modules[""]
        return _subject(text, model, twin.inputs, is_twin=True, dtype=dtype), model
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
    values = token_inputs(model, device=_CPU) or inferred_inputs(model, device=_CPU)
    if values is None:
        raise ValueError(
            f"MODEL: the inputs of {name} are not known: its forward needs something other than "
            "token ids. Check it in a script of your own, with parallelize and example_inputs"
        )
    inputs = Inputs(values, with_labels(model, values), insist=True)
    return _subject(text, model, inputs, is_twin=False, dtype=dtype), model


def _made(text: str, config: Any) -> nn.Module:
    if config is None:
        return named_model(text, device="cpu").float()
    return small_model(named_model(text), config, device="cpu")


def _subject(
    text: str, model: nn.Module, inputs: Inputs, *, is_twin: bool, dtype: torch.dtype
) -> Subject:
    """``model`` gets the data type."""
    model.to(dtype).train()
    parameters: Sequence[nn.Parameter] = describe(model).parameters
    return Subject(
        text=text,
        is_twin=is_twin,
        config=model.config if is_configured(model) else None,
        dtype=dtype,
        values=[p.detach().clone() for p in parameters],
        buffers={name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        trains=[p.requires_grad for p in parameters],
        inputs=inputs,
    )
