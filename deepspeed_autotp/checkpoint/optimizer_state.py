# SPDX-License-Identifier: Apache-2.0
"""The states of an optimizer as torch.distributed.checkpoint saves and loads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepspeed_autotp.checkpoint.shard_tensor import Given, placed
from deepspeed_autotp.interop.optimizers import first_state, is_unstepped
from deepspeed_autotp.interop.wrappers import without_wrappers
from deepspeed_autotp.state.fully_shard import settle_parameters
from deepspeed_autotp.state.sharded_model import TensorParallel

_PARAMS = "params"


class OptimizerState:
    """The states of ``optimizer`` by the names of ``model``; a ``Stateful`` of DCP.

    ``{"state": {name: {key: value}}, "param_groups": [{..., "params": names}]}``, as torch's
    ``get_optimizer_state_dict`` has it. A state of the shape of its parameter has its layout, a
    number is equal on all ranks, and others are refused. A parameter that has not been stepped has
    the states of a first step with a zero gradient, so that any two runs have the same keys.
    """

    def __init__(
        self, model: nn.Module, state: TensorParallel | None, optimizer: Optimizer
    ) -> None:
        self._model = model
        self._state = state
        self._optimizer = optimizer
        self._given = Given({})
        self._made: dict[str, dict[str, Any]] = {}  # of parameters that were not stepped
        for name, parameter, group in self._parameters():  # the errors of state_dict, now
            for key, value in self._states_of(name, parameter, group).items():
                self._value(f"{name}: {key}", value, parameter)
            self._made.clear()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Full shapes by full names, in the memory of the optimizer's tensors."""
        settle_parameters(self._model, self._state)
        self._made = {}
        states = {}
        for name, parameter, group in self._parameters():
            found = self._states_of(name, parameter, group)
            states[name] = {
                key: self._value(f"{name}: {key}", value, parameter) for key, value in found.items()
            }
        made = {"state": states, "param_groups": self._groups()}
        self._given = Given(made)
        return made

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what is no tensor; tensors of :meth:`state_dict` were read in place.

        ValueError where the groups of the checkpoint have other parameters.
        """
        self._given.check(state_dict)
        settle_parameters(self._model, self._state)
        own, loaded = self._groups(), state_dict["param_groups"]
        for index, (mine, theirs) in enumerate(zip(own, loaded, strict=True)):
            if list(mine[_PARAMS]) != list(theirs[_PARAMS]):
                raise ValueError(
                    f"checkpoint_state: the optimizer's group {index} has other parameters in the "
                    f"checkpoint, {_difference(theirs[_PARAMS], mine[_PARAMS])}; make the "
                    "optimizer's groups as the saved run did. The states were read: start anew"
                )
        for group, theirs in zip(self._optimizer.param_groups, loaded, strict=True):
            group.update({key: value for key, value in theirs.items() if key != _PARAMS})
        for name, parameter, group in self._parameters():
            found = self._states_of(name, parameter, group)
            values = state_dict["state"].get(name, {})
            found.update({k: v for k, v in values.items() if not isinstance(v, Tensor)})
            # What was not stepped stays without states, for the optimizer to make.
            if found and not (name in self._made and is_unstepped(found)):
                self._optimizer.state[parameter] = found
        self._made = {}

    def _parameters(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """The parameters that the optimizer steps: name, parameter and its group."""
        names = self._names()
        for group in self._optimizer.param_groups:
            for parameter in group[_PARAMS]:
                if parameter.requires_grad or self._optimizer.state.get(parameter):
                    yield names[id(parameter)], parameter, group

    def _groups(self) -> list[dict[str, Any]]:
        names = self._names()
        return [
            {**group, _PARAMS: [names[id(parameter)] for parameter in group[_PARAMS]]}
            for group in self._optimizer.param_groups
        ]

    def _names(self) -> dict[int, str]:
        """The names of the optimizer's parameters. ValueError where one is not the model's."""
        names = {id(p): without_wrappers(name) for name, p in self._model.named_parameters()}
        for index, group in enumerate(self._optimizer.param_groups):
            for place, parameter in enumerate(group[_PARAMS]):
                if id(parameter) not in names:
                    raise ValueError(
                        f"checkpoint_state: optimizer: parameter {place} of group {index}, of "
                        f"shape {list(parameter.shape)}, is not a parameter of "
                        f"{type(self._model).__name__}; pass the optimizer of this model, and make "
                        "it after fully_shard, which replaces parameters"
                    )
        strange = [key for key in self._optimizer.state if id(key) not in names]
        if strange:
            raise ValueError(
                f"checkpoint_state: optimizer: {type(self._optimizer).__name__} has a state of "
                f"{type(strange[0]).__name__}, expected states of parameters alone; save it "
                "without its optimizer"
            )
        return names

    def _states_of(self, name: str, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] | None = self._optimizer.state.get(parameter)
        if found:
            return found
        if name not in self._made:
            self._made[name] = first_state(self._optimizer, parameter, group)
        return self._made[name]

    def _value(self, where: str, value: Any, parameter: Tensor) -> Any:
        entry = None if self._state is None else self._state.entry(parameter)
        if self._state is None or entry is None or not entry.is_sharded:
            return value
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if value.shape != parameter.shape:
            raise ValueError(
                f"checkpoint_state: optimizer: {type(self._optimizer).__name__} has for {where} a "
                f"tensor of shape {list(value.shape)}, expected a number, or the shape of the "
                f"parameter's shard, {list(parameter.shape)}: which elements of the full tensor it "
                "belongs to is not known; use an optimizer with states that are one number per "
                "weight, such as AdamW, or save the model alone"
            )
        return placed(value, entry, self._state.group.rank)


def _difference(theirs: list[str], mine: list[str]) -> str:
    for name in theirs:
        if name not in mine:
            return f"{name!r} among them"
    for name in mine:
        if name not in theirs:
            return f"without {name!r}"
    return "in another order"
