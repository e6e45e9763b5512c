# SPDX-License-Identifier: Apache-2.0
"""A torch model as the names, shapes and integers that the core plans from.

Reads; decides nothing. Works on meta tensors and on models whose weights are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from deepspeed_autotp._core import Model
from deepspeed_autotp.config.validation import shown
from deepspeed_autotp.interop.deepspeed.parameters import full_shape
from deepspeed_autotp.interop.labels import labels_argument
from deepspeed_autotp.interop.transformers import (
    are_blocks_of_experts,
    are_routed_experts,
    is_conv1d,
    model_facts,
    tp_plan,
    user_tp_plan_entries,
)
from deepspeed_autotp.planning.model_data import ModelData, ParameterRow, Style


@dataclass(frozen=True, slots=True)
class Description:
    """The core's view of a model with its ``tp_plan``, and the torch objects behind its indices.

    ``parameters[i]`` is the tensor of the plan's entry ``i`` and ``modules`` maps every module
    name that the plan uses to its module. ``replaced_later`` names modules, with ``*`` for each
    index, that stay replicated in every plan, as DeepSpeed's AutoEP replaces them.
    """

    model: Model
    styles: tuple[Style, ...]
    parameters: tuple[nn.Parameter, ...]
    modules: dict[str, nn.Module]
    replaced_later: tuple[str, ...] = ()


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if is_conv1d(module):
        return "conv1d"
    if are_blocks_of_experts(module):
        return "expert blocks"
    return "experts" if are_routed_experts(module) else "other"


def _integers(module: nn.Module) -> dict[str, int]:
    """Its own, and as "config.<key>" those of a configuration that its forward may read."""
    own = {key: value for key, value in vars(module).items() if type(value) is int}
    if any(_kind(child) in ("linear", "conv1d") for child in module.children()):
        own |= {f"config.{key}": value for key, value in _config_integers(module).items()}
    return own


def _config_integers(module: nn.Module) -> dict[str, int]:
    """Of a plain object; one that makes its attributes itself cannot be given other values."""
    config = vars(module).get("config")
    if type(type(config)) is not type or "__dict__" not in dir(config):
        return {}
    return {key: value for key, value in vars(config).items() if type(value) is int}


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


# Gives the shape of a full parameter.
ShapeOf = Callable[[nn.Parameter], tuple[int, ...]]
LeavesOut = Callable[[nn.Parameter], bool]


def _nothing(parameter: nn.Parameter) -> bool:
    return False


def describe(
    model: nn.Module, *, shape_of: ShapeOf = full_shape, leaves_out: LeavesOut = _nothing
) -> Description:
    """Read ``model``, but for the parameters that it ``leaves_out``; a tensor that has several
    names appears once per name, tied to the first."""
    data, parameters = described(model, shape_of=shape_of, leaves_out=leaves_out)
    return Description(data.model(), data.styles, parameters, dict(model.named_modules()))


def described(
    model: nn.Module, *, shape_of: ShapeOf = full_shape, leaves_out: LeavesOut = _nothing
) -> tuple[ModelData, tuple[nn.Parameter, ...]]:
    """As data, and the tensors behind its parameters."""
    modules = dict(model.named_modules())
    places = {module: index for index, module in enumerate(modules.values())}
    rows, parameters = _parameters(modules, shape_of, leaves_out)
    facts = model_facts(model)
    data = ModelData(
        modules=tuple(
            (name, type(module).__name__, _kind(module), _integers(module))
            for name, module in modules.items()
        ),
        parameters=rows,
        styles=styles_of(model),
        model_type=facts.model_type,
        prefix=facts.prefix,
        integers=facts.integers,
        input_embedding=places.get(facts.input_embedding, -1),
        output_head=places.get(facts.output_head, -1),
        takes_labels=labels_argument(model) is not None,
    )
    return data, parameters


def styles_of(model: nn.Module) -> tuple[Style, ...]:
    """The ``tp_plan`` of ``model``, and which of its entries are the user's. ValueError for one
    that is no pattern and the name of a style."""
    own, found = user_tp_plan_entries(model), tp_plan(model)
    for pattern, style in found.items():
        if not isinstance(pattern, str) or not isinstance(style, str):
            raise ValueError(
                f"tp_plan: got {shown(pattern)}: {shown(style)}, expected a pattern of names and "
                "the name of a style; leave it out"
            )
    return tuple((pattern, style, pattern in own) for pattern, style in found.items())


def _parameters(
    modules: Mapping[str, nn.Module], shape_of: ShapeOf, leaves_out: LeavesOut
) -> tuple[tuple[ParameterRow, ...], tuple[nn.Parameter, ...]]:
    first: dict[int, int] = {}
    parameters: list[nn.Parameter] = []
    rows: list[ParameterRow] = []
    for index, (name, module) in enumerate(modules.items()):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if leaves_out(parameter):
                continue
            tied = first.setdefault(id(parameter), len(parameters))
            rows.append(
                (
                    f"{name}.{leaf}" if name else leaf,
                    leaf,
                    index,
                    shape_of(parameter),
                    dtype_name(parameter.dtype),
                    parameter.itemsize,
                    tied if tied < len(parameters) else -1,
                )
            )
            parameters.append(parameter)
    return tuple(rows), tuple(parameters)
