# SPDX-License-Identifier: Apache-2.0
"""What one rank of ``autotp check`` does: shard the model, train it, compare."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from deepspeed_autotp.api.pipeline import described
from deepspeed_autotp.api.torch_loop import sharded_over
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.distributed.consensus import Agreement
from deepspeed_autotp.distributed.failure_barrier import PeerFailed, failure_barrier
from deepspeed_autotp.interop.progress_bars import without_warnings
from deepspeed_autotp.planning.agreed_plans import compared
from deepspeed_autotp.planning.model_description import Description, describe
from deepspeed_autotp.self_check.subject import Subject
from deepspeed_autotp.self_check.training import Training, train
from deepspeed_autotp.self_check.training_comparison import (
    FullTraining,
    Measured,
    first_difference,
    measured,
    unseen_modules,
)
from deepspeed_autotp.state.grad_norm import clip_grad_norm_
from deepspeed_autotp.state.sharded_model import TensorParallel, tensor_parallel


@dataclass(frozen=True, slots=True)
class Found:
    """What a rank has found. ``refused`` is why the model was not sharded, ``difference`` the first
    one in words, ``failure`` why it did not train."""

    refused: str | None
    difference: str | None
    failure: str | None
    measured: list[Measured]
    losses: list[float]
    warnings: list[str]

    @property
    def problem(self) -> str | None:
        """The first of them, in the order in which one learns of them."""
        return self.refused or self.failure or self.difference


class _Warnings(logging.Handler):
    """Keeps what the package warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def check_rank(
    told: Callable[[int], object], files: str, settings: TPTrainingConfig, steps: int
) -> Found:
    """Train what is in the folder ``files``, sharded by ``settings``, and compare."""
    with without_warnings():
        return _checked(told, files, settings, steps)


def _checked(
    told: Callable[[int], object], files: str, settings: TPTrainingConfig, steps: int
) -> Found:
    subject: Subject = torch.load(Path(files, "subject"), weights_only=False)
    full: FullTraining = torch.load(Path(files, "full"), weights_only=False, mmap=True)
    warnings = _Warnings()
    logger = logging.getLogger("deepspeed_autotp")
    logger.addHandler(warnings)
    logger.propagate = False
    model = subject.made()
    description = describe(model)
    try:
        refused = _shard(model, settings, subject)
    except ValueError as error:  # not even without a self-check
        return Found(str(error), None, None, [], [], warnings.texts)
    state = tensor_parallel(model)
    sharded, failure = _trained(description, state, subject, steps, told)
    agreement = Agreement(state.group.cpu_handle)
    difference, found, losses = None, [], []
    if all(agreement.exchange(failure is None)):
        assert sharded is not None
        difference = first_difference(sharded, full, state)
        found = measured(sharded, full, state, agreement)
        losses = [float(each) for each in sharded.losses]
    return Found(refused, difference, failure, found, losses, warnings.texts)


def _shard(model: nn.Module, settings: TPTrainingConfig, subject: Subject) -> str | None:
    """Why the self-check refuses the plan; the model is sharded nevertheless, to show by how much
    it differs. ValueError where it cannot be."""

    def shard(settings: TPTrainingConfig) -> None:
        sharded_over(
            None,
            lambda: (settings, compared(settings), described(model)),
            example_inputs=subject.inputs.values,
            device=None,
            large_names=subject.large_names,
        )

    try:
        shard(settings)
    except ValueError as error:
        try:
            shard(settings.model_copy(update={"self_check": False}))
        except ValueError:
            raise error from None
        return str(error)
    return None


def _trained(
    description: Description,
    state: TensorParallel,
    subject: Subject,
    steps: int,
    told: Callable[[int], object],
) -> tuple[Training | None, str | None]:
    """The training, or why there is none: an empty text where another rank says it."""
    unseen = unseen_modules(state, description.modules)
    done = told if state.group.rank == 0 else lambda _: None
    try:
        with failure_barrier(state.group):
            clip, inputs = clip_grad_norm_, subject.inputs
            return train(
                description, inputs, steps=steps, clip=clip, unseen=unseen, done=done
            ), None
    except PeerFailed:
        return None, ""
    except Exception as error:
        return None, f"the sharded model does not train: {type(error).__name__}: {error}"
