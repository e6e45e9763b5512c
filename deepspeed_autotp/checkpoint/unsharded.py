# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of TP size 1, and models that are not sharded: their layouts have full tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from deepspeed_autotp.checkpoint.layout import Layout, SavedParameter
from deepspeed_autotp.checkpoint.rank_files import CheckpointFiles
from deepspeed_autotp.interop.deepspeed.parameters import full_shape


def full(parameter: SavedParameter) -> SavedParameter:
    """The parameter where every rank has all of it."""
    return SavedParameter(parameter.name, parameter.shape, None, parameter.tied_to)


def unsharded(layout: Layout) -> Layout:
    """The layout of the same model at TP size 1."""
    return Layout(1, {name: full(parameter) for name, parameter in layout.parameters.items()})


def layout_of_model(model: nn.Module) -> Layout:
    """The layout of a model that is not sharded."""
    first: dict[int, str] = {}
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        tied_to = None if known == name else known
        parameters[name] = SavedParameter(name, full_shape(parameter), None, tied_to)
    return Layout(1, parameters)


def layout_of_files(files: CheckpointFiles, ties: Mapping[str, str | None]) -> Layout:
    """The layout of a checkpoint of TP size 1, whose parameters are tied as in ``ties``, by the
    names of all parameters of the model."""
    model = files.model(0)
    shapes = {
        name: tuple(value.shape)
        for name, value in model["module"].items()
        if name in ties or name not in model["buffer_names"]
    }
    # Under ZeRO 3 the weights are with the optimizer, and there are empty ones in their place.
    for noted in [*(model["param_shapes"] or []), model["frozen_param_shapes"] or {}]:
        shapes |= {name: tuple(shape) for name, shape in noted.items()}
    return Layout(
        1,
        {
            name: SavedParameter(
                name, shapes.get(ties.get(name) or name, shape), None, ties.get(name)
            )
            for name, shape in shapes.items()
        },
    )


def ties_of_files(files: CheckpointFiles) -> dict[str, str | None]:
    """The ties that the files of a checkpoint of TP size 1 show by themselves: one tensor under two
    names, or what ZeRO notes."""
    model = files.model(0)
    noted = model["shared_params"] or {}
    first: dict[tuple[object, ...], str] = {}
    ties: dict[str, str | None] = {}
    for name, value in model["module"].items():
        if name in model["buffer_names"]:
            continue
        if value.numel():
            known = first.setdefault((value.data_ptr(), value.shape, value.stride()), name)
            ties[name] = noted.get(name, None if known == name else known)
        else:  # under ZeRO 3
            ties[name] = noted.get(name)
    return ties


def is_unsharded(files: CheckpointFiles) -> bool:
    """Whether the files are those of a run with TP size 1, none of whose ranks' are missing."""
    found = list(files.folder.glob("*mp_rank_*_model_states.pt"))
    if not found or any("mp_rank_00_" not in file.name for file in found):
        return False
    ranks: object = files.model(0).get("mp_world_size")
    return ranks == 1
