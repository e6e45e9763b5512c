# SPDX-License-Identifier: Apache-2.0
"""Optimizers whose update of an element depends on the rest of its tensor, or of the model.

Of a shard they would form another number than of the full tensor, and each rank its own for a
replicated one where they go over the model. Known by the names of classes, since most of them come
from packages that may not be installed; optimizer_parts.py tries what has another name. What works
element by element is right on shards: SGD, Adam and its variants, Adagrad, RMSprop, Lion, Adadelta,
Rprop, schedule-free ones, 8-bit states.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_STEP = "step"

_FACTORS = "factors of rows and columns, and the root mean square of a tensor"
_ORTHOGONAL = "an orthogonal matrix of a full matrix"
_TRUST = "a ratio of the norms of a tensor and of its update"
_SKETCH = "the projection of a full matrix"
_KRONECKER = "products of a full matrix with itself"
_STEP_SIZE = "one step size from products over all parameters"
_COMPRESSED = "the mean size of a tensor for one-bit gradients"
_NORM = "a norm over a tensor or over all parameters"

# Names of classes and of DeepSpeed's optimizer.type, in lower case without underscores.
_OVER_TENSORS = {
    **dict.fromkeys(
        ("adafactor", "adalomo", "came", "sm3", "stableadamw", "galoreadafactor"), _FACTORS
    ),
    **dict.fromkeys(("muon", "muonwithauxadam", "singledevicemuon", "distmuon"), _ORTHOGONAL),
    **dict.fromkeys(("singledevicemuonwithauxadam", "adamuon", "normuon"), _ORTHOGONAL),
    **dict.fromkeys(("lamb", "fusedlamb", "fusedmixedprecisionlamb", "lamb8bit"), _TRUST),
    **dict.fromkeys(("lars", "larc", "lars8bit", "novograd", "fusednovograd", "adammini"), _TRUST),
    **dict.fromkeys(("galoreadamw", "galoreadamw8bit", "apolloadamw", "qgaloreadamw8bit"), _SKETCH),
    **dict.fromkeys(("shampoo", "distributedshampoo", "soap", "kfac", "psgd", "kron"), _KRONECKER),
    **dict.fromkeys(("lbfgs", "prodigy", "dadaptadam", "dadaptsgd", "dadaptlion"), _STEP_SIZE),
    **dict.fromkeys(("dadaptadagrad", "dadaptadan"), _STEP_SIZE),
    **dict.fromkeys(("onebitadam", "onebitlamb", "zerooneadam"), _COMPRESSED),
    **dict.fromkeys(("lomo", "sam", "asam", "gsam"), _NORM),
}


def refuse_optimizer_over_tensors(optimizer: Any, *, before: str) -> None:
    """ValueError for such an optimizer, an instance or a name; ``before`` says where it is from."""
    for name in _names(optimizer):
        formed = _OVER_TENSORS.get(name.lower().replace("_", ""))
        if formed is not None:
            raise ValueError(
                f"{before}: got {name}, which forms {formed}; of the shard of a rank it would form "
                "another one, and train another model than one process does. Use an optimizer that "
                "works element by element, such as AdamW, SGD, Adagrad or Lion"
            )


def wrapped_optimizers(optimizer: Any) -> Iterator[Any]:
    """An optimizer and those that it wraps, as Accelerate's does."""
    while optimizer is not None:
        yield optimizer
        optimizer = vars(optimizer).get("optimizer") if hasattr(optimizer, "__dict__") else None


def _names(optimizer: Any) -> Iterator[str]:
    """Names of the classes of an optimizer, and of those that it wraps, as Accelerate's does."""
    if isinstance(optimizer, str):
        yield optimizer
        return
    for each in wrapped_optimizers(optimizer):
        yield from (cls.__name__ for cls in type(each).__mro__)


def stand_in(optimizer: Optimizer, parameter: nn.Parameter, group: Mapping[str, Any]) -> Optimizer:
    """An optimizer with the attributes of ``optimizer``, for ``parameter`` alone as of ``group``,
    which has not stepped."""
    made: Optimizer = object.__new__(type(optimizer))
    vars(made).update(vars(optimizer))
    made.param_groups = [{**group, "params": [parameter]}]
    made.state = defaultdict(dict)
    return made


def step_alone(optimizer: Optimizer) -> None:
    """A step without its hooks, and without the counter that a scheduler puts around it."""
    inspect.unwrap(type(optimizer).step)(optimizer)


def first_state(
    optimizer: Optimizer, parameter: Tensor, group: Mapping[str, Any]
) -> dict[str, Any]:
    """The states of ``parameter``, of ``group``, before it is stepped: those that a step with a
    zero gradient makes, and a count of no steps. Nothing of ``optimizer`` changes."""
    zeros = nn.Parameter(torch.zeros_like(parameter))
    zeros.grad = torch.zeros_like(parameter)
    scratch = stand_in(optimizer, zeros, group)
    with torch.no_grad():
        step_alone(scratch)
    states = dict(scratch.state[zeros])
    if _STEP in states:
        states[_STEP] = states[_STEP] * 0
    return states


def is_unstepped(states: Mapping[str, Any]) -> bool:
    """Whether ``states`` of a parameter say that it was not stepped."""
    return _STEP in states and float(states[_STEP]) == 0.0
